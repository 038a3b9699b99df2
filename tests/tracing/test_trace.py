"""What the tracer finds, what it refuses to touch, and that it leaves the model alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import CASES, Case, GroupedCNN, PixelShuffler, ResidualCNN, Transformer, cifar_unet, small_unet, small_vae
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.tracing.labels import compress
from diffprune_fast.tracing.rules.movement import _reshape_map

X = (torch.empty(1, 3, 8, 8),)


class TwoConvs(nn.Module):
    """conv1 -> ``between`` -> conv2; what happens between is the test's matter."""

    def __init__(self, between: Any = None, width: int = 12, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, channels, 3, padding=1)
        self.between = between or F.silu

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.between(self.conv1(x)))


def members(plan: dpf.Plan, name: str) -> set[str]:
    return {m.place for m in plan[name].members}


def test_chain_of_convolutions_is_one_group() -> None:
    plan = dpf.trace(TwoConvs(), X)
    assert [g.name for g in plan.groups] == ["conv1"]
    assert members(plan, "conv1") == {"conv1.weight:0", "conv1.bias:0", "conv2.weight:1"}
    assert plan["conv1"].n_units == 12
    assert plan.frozen["conv2.weight:0"] == "is an output of the model"
    assert "conv1" in plan.frozen["conv1.weight:1"]


def test_cifar_unet_has_the_papers_size() -> None:
    with torch.device("meta"):
        plan = dpf.trace(cifar_unet())
    assert plan.params() == 35_746_307
    assert plan.macs() == pytest.approx(6.0655e9, rel=0.005)
    assert plan.macs(attention=True) == plan.macs() + 2 * 256 * 256 * 256 * 5 + 2 * 16 * 16 * 256


def test_params_and_macs_are_arithmetic_over_counts() -> None:
    plan = dpf.trace(TwoConvs(), X)
    assert plan.params({"conv1": np.arange(5)}) == 5 * 3 * 9 + 5 + 3 * 5 * 9 + 3
    assert plan.macs({"conv1": np.arange(5)}) == 64 * 9 * (3 * 5 + 5 * 3)
    assert plan.macs(np.array([5])) == plan.macs({"conv1": np.arange(5)})


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_plan_survives_json(case: Case) -> None:
    plan = dpf.trace(case.make(), case.example_inputs)
    again = dpf.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.macs() == plan.macs()
    assert again.params(np.ones(len(plan.groups))) == plan.params(np.ones(len(plan.groups)))
    assert str(again) == str(plan)


def test_plan_of_another_format_is_refused() -> None:
    text = dpf.trace(TwoConvs(), X).to_json().replace('"format":1', '"format":99')
    with pytest.raises(ValueError, match="trace the model again"):
        dpf.Plan.from_json(text)


def test_hash_follows_structure_not_weights() -> None:
    torch.manual_seed(0)
    a = dpf.trace(small_unet())
    torch.manual_seed(1)
    assert dpf.trace(small_unet()).hash == a.hash
    assert dpf.trace(small_unet(layers_per_block=2)).hash != a.hash


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = small_unet().train()
    model.mid_block.eval()
    before = copy.deepcopy(model.state_dict())
    identity = [id(p) for p in model.parameters()]
    seen: list[Tensor] = []
    handle = model.conv_in.register_forward_hook(lambda m, i, o: seen.append(o))
    dpf.trace(model)
    handle.remove()
    assert {t.is_meta for t in seen} == {True}, "the model's own hooks run, on meta"
    assert [id(p) for p in model.parameters()] == identity
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training
    assert not model.mid_block.training
    assert not any(hasattr(p, "_walk_note") for p in model.parameters())


class Caches(TwoConvs):
    """A forward that keeps tables on the module, as rotary embeddings do."""

    table: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(8, device=x.device)
            self.kept.append(self.table)
        return super().forward(x) * self.table


class Angles:
    """Tables on an object that is no module, as rotary embeddings keep them."""

    table: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.table is None:
            self.table = torch.arange(8.0) * 0.5
        return self.table


def test_tables_that_an_earlier_forward_cached_use_the_same_numbers() -> None:
    class Rotary(TwoConvs):
        def __init__(self) -> None:
            super().__init__()
            self.angles = Angles()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.angles()) * 3

    model = Rotary()
    plan = dpf.trace(model, X)
    model(torch.randn(1, 3, 8, 8))
    dpf.prune(model, plan, {"conv1": np.arange(5)}, example_inputs=X)
    assert model.conv2.in_channels == 5


def test_tables_that_a_forward_caches_are_not_left_on_meta() -> None:
    model = Caches()
    plan = dpf.trace(model, X)
    assert model.table is None
    assert model.kept == []
    assert model(torch.randn(1, 3, 8, 8)).device.type == "cpu"
    assert dpf.trace(model, X) == plan


def test_failing_forward_names_the_module_and_leaves_the_model() -> None:
    model = TwoConvs(lambda h: h @ torch.ones(3, 3))  # 8 columns meet 3 rows
    identity = [id(p) for p in model.parameters()]
    with pytest.raises(dpf.tracing.TraceError, match="example_inputs"):
        dpf.trace(model, X)
    assert [id(p) for p in model.parameters()] == identity
    assert model.conv1.weight.device.type == "cpu"


def test_unknown_class_without_inputs_says_what_to_give() -> None:
    with pytest.raises(ValueError, match="example_inputs"):
        dpf.trace(TwoConvs())


def test_inputs_by_name() -> None:
    assert dpf.trace(TwoConvs(), {"x": X[0]}) == dpf.trace(TwoConvs(), X)


FREEZING = {
    "an op without a rule": lambda h: h + torch.cumulative_trapezoid(h, dim=1).sum() + torch.kron(h, h).sum(),
    "softmax over channels": lambda h: h.softmax(1),
    "a mean over channels": lambda h: h - h.mean(1, keepdim=True),
    "a constant per channel": lambda h: h * torch.arange(12.0, device=h.device)[None, :, None, None],
    "channels picked by position": lambda h: h + h[:, :1],
    "a reordering": lambda h: h.flip(1),
    "an indexed write": lambda h: h.clone().index_put_((torch.tensor([0]), torch.tensor([0])), h[0, 1]),
    "a write into a buffer": lambda h: torch.zeros_like(h[:, :1]).repeat(1, 12, 1, 1).copy_(h),
    "unequal pieces": lambda h: torch.cat(h.split([4, 8], dim=1), 1),
}


@pytest.mark.parametrize("name", FREEZING)
def test_what_cannot_be_followed_freezes(name: str) -> None:
    plan = dpf.trace(TwoConvs(FREEZING[name]), X)
    assert plan.groups == ()
    assert "conv1.weight:0" in plan.frozen
    assert plan.frozen["conv1.weight:0"] != dpf.tracing.grouping.UNUSED


def test_op_without_a_rule_is_named() -> None:
    plan = dpf.trace(TwoConvs(lambda h: h + torch.cdist(h, h).mean()), X)
    assert "no rule for aten.cdist" in plan.frozen["conv1.weight:0"] or "cdist" in plan.frozen["conv1.weight:0"]


def test_reading_a_number_from_ids_is_followed() -> None:
    class Positions(TwoConvs):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
            longer = (ids + ids).max().item() > 3
            return super().forward(torch.cat([x, x]) if longer else x)

    longer, shorter = (dpf.trace(Positions(), (*X, torch.arange(n))).costs for n in (3, 2))
    assert [c.scale for c in longer] == [2 * c.scale for c in shorter]


def test_autocast_of_an_activations_device_is_followed() -> None:
    def between(h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, torch.bfloat16):
            return h * 2

    assert "conv1" in [g.name for g in dpf.trace(TwoConvs(between), X).groups]


def test_ids_along_other_dims_leave_channels_free() -> None:
    ids, mask = torch.tensor([[3, 0], [1, 1]]), torch.arange(8) % 2 == 0
    for between in (lambda h: h[:, :, ids, 0], lambda h: h[:, :, mask], lambda h: h[:, :, ids.to(h.device)].mean(3)):
        assert members(dpf.trace(TwoConvs(between), X), "conv1") == {"conv1.weight:0", "conv1.bias:0", "conv2.weight:1"}
    assert dpf.trace(TwoConvs(lambda h: h[:, torch.arange(12)]), X).groups == ()


def test_reading_a_number_from_an_activation_is_refused() -> None:
    with pytest.raises(dpf.tracing.TraceError, match="depends on the data"):
        dpf.trace(TwoConvs(lambda h: h * (2.0 if h.sum().item() > 0 else 1.0)), X)


def test_ops_of_two_activations_join_them() -> None:
    class Both(TwoConvs):
        def forward(self, x: Tensor) -> Tensor:
            h = self.conv1(x)
            return self.conv2(torch.max(h, F.prelu(h, self.slope)).clamp(min=-h.abs()))

    model = Both()
    model.slope = nn.Parameter(torch.full((12,), 0.1))
    plan = dpf.trace(model, X)
    assert members(plan, "conv1") == {"conv1.weight:0", "conv1.bias:0", "conv2.weight:1", "slope:0"}


def test_maximum_with_a_constant_freezes() -> None:
    plan = dpf.trace(TwoConvs(lambda h: torch.max(torch.zeros(1, 12, 8, 8, device=h.device), h)), X)
    assert plan.groups == ()


def test_residual_joins_both_producers() -> None:
    plan = dpf.trace(ResidualCNN(), (torch.empty(1, 3, 16, 16),))
    assert {"stem.weight:0", "bn.weight:0", "bn.running_var:0", "pointwise.weight:0", "depthwise.weight:0"} <= members(
        plan, "stem"
    )
    depthwise = next(m for m in plan["stem"].members if m.place == "depthwise.weight:0")
    assert depthwise.index.tolist() == [[2 * i, 2 * i + 1] for i in range(16)]


def test_concat_offsets_the_second_half() -> None:
    plan = dpf.trace(ResidualCNN(), (torch.empty(1, 3, 16, 16),))
    head = next(m for m in plan["stem"].members if m.place == "head.weight:1")
    assert head.index.ravel().tolist() == list(range(24, 40))


def test_grouped_convolution_ties_offsets_and_constrains_rows() -> None:
    plan = dpf.trace(GroupedCNN(), X)
    assert plan["conv_in"].n_units == 8, "one unit per offset in the 4 groups of 8 channels"
    assert next(m for m in plan["conv_in"].members if m.place == "conv_in.weight:0").index[0].tolist() == [0, 8, 16, 24]
    assert {c.kind for c in plan.constraints} == {"conv_groups", "chunk"}


def test_pixel_shuffle_makes_one_unit_of_its_block() -> None:
    plan = dpf.trace(PixelShuffler(), X)
    for name in ("conv1", "conv2"):
        produced = next(m for m in plan[name].members if m.place == f"{name}.weight:0")
        assert produced.index.tolist() == [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(len(produced.index))]


def test_tied_parameters_are_one_place() -> None:
    plan = dpf.trace(Transformer(), (torch.zeros(1, 12, dtype=torch.long),))
    assert "out.weight" not in plan.shapes
    assert "tokens.weight:1" in members(plan, "blocks.0.out")
    assert "vocabulary" in plan.frozen["tokens.weight:0"]


def test_softmax_scale_is_fixed_where_it_follows_the_head_size() -> None:
    plan = dpf.trace(Transformer(), (torch.zeros(1, 12, dtype=torch.long),))
    fix = plan.scale_fixes[0]
    assert fix.n_dims == 8
    assert [n for n, _ in fix.targets] == ["blocks.0.qkv.0.weight", "blocks.0.qkv.0.bias"]


def test_latents_of_a_vae_stay() -> None:
    plan = dpf.trace(small_vae())
    assert plan.frozen["quant_conv.weight:0"] == "is an output of the model"
    assert "post_quant_conv.weight:1" in plan.frozen


def test_multihead_attention_is_left_whole_and_the_rest_is_not() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    plan = dpf.trace(layer, (torch.empty(1, 5, 16),))
    assert [g.name for g in plan.groups] == ["linear1"]
    assert "MultiheadAttention" in plan.frozen["self_attn.in_proj_weight:0"]


def test_unused_parameters_stay() -> None:
    model = TwoConvs()
    model.spare = nn.Linear(4, 4)
    assert dpf.trace(model, X).frozen["spare.weight:0"] == dpf.tracing.grouping.UNUSED


def test_large_model_needs_no_memory_for_weights() -> None:
    """A convolution of 4 billion weights (16 GB) is planned in its config's memory."""
    with torch.device("meta"):
        model = TwoConvs(width=21_000, channels=21_000)
    plan = dpf.trace(model, (torch.empty(1, 21_000, 8, 8, device="meta"),))
    assert plan.params() == 2 * 21_000**2 * 9 + 42_000
    assert plan["conv1"].n_units == 21_000


def test_units_partition_every_place() -> None:
    plan = dpf.trace(small_unet())
    taken: dict[str, list[int]] = {}
    for g in plan.groups:
        for m in g.members:
            taken.setdefault(m.place, []).extend(m.index.ravel().tolist())
    for place, indices in taken.items():
        name, _, dim = place.rpartition(":")
        assert len(indices) == len(set(indices))
        assert max(indices) < plan.shapes[name][int(dim)]


RESHAPES = [
    ((2, 6, 4), (2, 2, 3, 4)),
    ((2, 12, 5), (2, 3, 20)),
    ((1, 3, 1, 4), (3, 4, 1)),
    ((6, 4), (2, 3, 2, 2)),
    ((4,), (1, 4, 1)),
    ((5, 1), (5,)),
    ((2, 3, 4), (4, 3, 2)),
    ((1, 1, 6), (6,)),
]


@pytest.mark.parametrize(("before", "after"), RESHAPES)
def test_reshapes_of_a_layer_leave_out_the_dims_on_which_it_does_not_depend(before: Any, after: Any) -> None:
    for mask in range(2 ** len(before)):
        shape = [n if mask >> d & 1 else 1 for d, n in enumerate(before)]
        layer = np.arange(1, int(np.prod(shape)) + 1, dtype=np.int32).reshape(shape)
        if layer.size == 1:
            continue
        got = _reshape_map(layer, before, after)
        want = np.broadcast_to(layer, before).reshape(after)
        assert got is not None
        assert np.array_equal(np.broadcast_to(got, after), want)
        assert got.size == compress(want, layer.size).size  # type: ignore[union-attr]


class SizeFromAttribute(nn.Module):
    """A forward that takes its width from a number which nobody can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out, self.width = nn.Linear(8, 12), nn.Linear(12, 5), 12

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x).view(x.shape[0], self.width))


def test_widths_that_a_forward_reads_elsewhere_stay_and_the_reason_has_the_line() -> None:
    plan = dpf.trace(SizeFromAttribute(), (torch.empty(3, 8),))
    assert not plan.groups
    reason = plan.frozen["inner.weight:0"]
    assert "has a width that is read elsewhere" in reason
    assert "test_trace.py" in reason
    assert "self.inner(x).view(x.shape[0], self.width)" in reason
