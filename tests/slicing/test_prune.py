"""Slicing: what survives, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from models import ExplicitAttention, ResidualCNN, Transformer, small_condition_unet, small_unet
from oracle import assert_exact, random_keep
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.slicing import SliceError

X = (torch.empty(1, 3, 16, 16),)
IDS = (torch.arange(12)[None],)


def pruned_state(model: nn.Module, inputs: Any = None) -> tuple[dpf.Plan, dict[str, np.ndarray]]:
    plan = dpf.trace(model, inputs)
    return plan, random_keep(plan, 0.4, 0)


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[str, Any]]]:
    """Every tensor and every plain attribute of every module."""
    plain = [
        (f"{n}.{k}", v)
        for n, m in model.named_modules()
        for k, v in vars(m).items()
        if isinstance(v, (int, float, str, tuple, bool))
    ]
    return {n: t.clone() for n, t in model.state_dict().items()}, plain


def assert_same(model: nn.Module, before: tuple[dict[str, Tensor], list[tuple[str, Any]]]) -> None:
    state, plain = snapshot(model)
    assert list(state) == list(before[0])
    assert all(torch.equal(t, before[0][n]) for n, t in state.items())
    assert plain == before[1]


def test_values_are_the_kept_slice() -> None:
    model = ResidualCNN()
    weight = model.pointwise.weight.detach().clone()
    plan = dpf.trace(model, X)
    dpf.prune(model, plan, {"stem": np.array([0, 3, 7])}, example_inputs=X)
    columns = [0, 1, 6, 7, 14, 15]
    assert torch.equal(model.pointwise.weight, weight[[0, 3, 7]][:, columns])
    assert model.bn.running_mean.shape == (3,)
    assert (model.depthwise.groups, model.depthwise.in_channels, model.depthwise.out_channels) == (3, 3, 6)
    assert (model.bn.num_features, model.head.in_features) == (3, 24 + 3)


def test_groups_not_named_stay_whole() -> None:
    model = ResidualCNN()
    plan = dpf.trace(model, X)
    result = dpf.prune(model, plan, {}, example_inputs=X)
    assert result.after == result.before
    assert result.attributes == {}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_format_dtype_identity_and_hooks_survive(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    model = small_unet().to(dtype).to(memory_format=memory_format)
    model.conv_in.weight.requires_grad_(False)
    model.conv_in.note = "mine"
    calls: list[int] = []
    model.mid_block.register_forward_hook(lambda m, i, o: calls.append(o.shape[1]))
    identity = {n: id(p) for n, p in model.named_parameters()}
    plan, keep = pruned_state(model)
    before = len(calls)
    dpf.prune(model, plan, keep, norm_groups="exact")
    assert {n: id(p) for n, p in model.named_parameters()} == identity
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv_in.weight"]
    assert model.conv_in.note == "mine"
    convs = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.shape[2] > 1]
    assert all(w.is_contiguous(memory_format=memory_format) for w in convs)
    model(torch.randn(1, 3, 16, 16, dtype=dtype), 1)
    assert len(calls) > before
    assert calls[-1] == model.mid_block.resnets[1].conv2.out_channels


def test_memory_is_given_back() -> None:
    model = small_unet()
    plan, keep = pruned_state(model)
    dpf.prune(model, plan, keep, norm_groups="exact")
    for p in model.parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()


def test_tied_parameters_stay_tied() -> None:
    model = Transformer()
    plan, keep = pruned_state(model, IDS)
    dpf.prune(model, plan, keep, example_inputs=IDS)
    assert model.out.weight is model.tokens.weight
    assert model.tokens.embedding_dim == model.out.in_features == model.norm.normalized_shape[0] < 32
    assert model.blocks[0].norm2.normalized_shape == (model.norm.normalized_shape[0],), "a norm without weights"


def test_query_projection_takes_the_softmax_scale() -> None:
    model = Transformer()
    weight = model.blocks[0].qkv[0].weight.detach().clone()
    plan = dpf.trace(model, IDS)
    heads = np.concatenate([8 * h + np.arange(2) for h in range(4)])
    keep = {"blocks.0.qkv.0": heads, "blocks.0.qkv.2": heads}
    dpf.prune(model, plan, keep, example_inputs=IDS)
    torch.testing.assert_close(model.blocks[0].qkv[0].weight, weight[heads] * (2 / 8) ** 0.5)
    assert dpf.trace(model, IDS).scale_fixes[0].n_dims == 2


def test_stored_softmax_scale_is_left_alone() -> None:
    model = ExplicitAttention()
    plan = dpf.trace(model, (torch.empty(1, 5, 6),))
    assert plan.scale_fixes == ()
    weight = model.qkv.weight.detach().clone()
    keep = random_keep(plan, 0.5, 0)
    dpf.prune(model, plan, {n: k for n, k in keep.items() if n != "proj_in"}, example_inputs=(torch.empty(1, 5, 6),))
    rows = np.sort(np.concatenate([keep["qkv"], plan["qkv#2"].members[0].index[keep["qkv#2"]].ravel()]))
    assert rows.size <= model.qkv.weight.shape[0]
    kept = {tuple(r) for r in model.qkv.weight.detach().tolist()}
    assert kept <= {tuple(r) for r in weight.tolist()}


def _unsorted(keep: dict[str, np.ndarray]) -> None:
    keep["conv_in"] = keep["conv_in"][::-1].copy()


def _empty(keep: dict[str, np.ndarray]) -> None:
    keep["conv_in"] = np.zeros(0, np.int64)


def _out_of_range(keep: dict[str, np.ndarray]) -> None:
    keep["conv_in"] = np.append(keep["conv_in"], 999)


def _unknown(keep: dict[str, np.ndarray]) -> None:
    keep["conv_inn"] = keep["conv_in"]


def _uneven(keep: dict[str, np.ndarray]) -> None:
    name = next(n for n in keep if n.endswith("to_q"))
    keep[name] = keep[name][1:]


def _repeated(keep: dict[str, np.ndarray]) -> None:
    keep["conv_in"] = np.sort(np.append(keep["conv_in"], keep["conv_in"][0]))


@pytest.mark.parametrize("spoil", [_unsorted, _empty, _out_of_range, _unknown, _uneven, _repeated])
def test_wrong_keep_set_is_refused(spoil: Callable[[dict[str, np.ndarray]], None]) -> None:
    model = small_unet()
    plan, keep = pruned_state(model)
    spoil(keep)
    before = snapshot(model)
    with pytest.raises(SliceError, match="keep-set"):
        dpf.prune(model, plan, keep)
    assert_same(model, before)


def test_plan_of_another_model_is_refused() -> None:
    plan, keep = pruned_state(small_unet())
    other = small_unet(layers_per_block=2)
    before = snapshot(other)
    with pytest.raises(SliceError, match="another model"):
        dpf.prune(other, plan, keep)
    assert_same(other, before)


def test_pruning_twice_needs_a_new_plan() -> None:
    model = small_unet()
    plan, keep = pruned_state(model)
    dpf.prune(model, plan, keep, norm_groups="exact")
    with pytest.raises(SliceError, match="new plan"):
        dpf.prune(model, plan, keep, norm_groups="exact")
    again, keep = pruned_state(model)
    assert dpf.prune(model, again, keep, norm_groups="exact").after.params < again.params()


def test_model_on_meta_is_refused() -> None:
    with torch.device("meta"):
        model = small_unet()
    plan, keep = pruned_state(model)
    with pytest.raises(SliceError, match="load the weights"):
        dpf.prune(model, plan, keep)


def test_parameters_that_share_memory_are_refused() -> None:
    model = small_unet()
    plan, keep = pruned_state(model)
    shared = model.down_blocks[0].resnets[0].conv1
    model.up_blocks[-1].resnets[0].conv1.bias = nn.Parameter(shared.bias.data)
    before = snapshot(model)
    with pytest.raises(ValueError, match="memory"):
        dpf.prune(model, plan, keep, norm_groups="exact")
    assert_same(model, before)


class Reads(nn.Module):
    """A forward that reads its width from where slicing can't follow."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.width = how, 16
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv1(x))
        if self.how == "attribute":
            h = h.reshape(h.shape[0], self.width, -1).reshape(h.shape[0], self.width, *h.shape[2:])
        if self.how == "literal split":
            a, b = h.split(8, dim=1)
            h = torch.cat([torch.relu(a), torch.sigmoid(b)], dim=1)
        if self.how == "scale":
            h = h / float(h.shape[1]) ** 0.5
        if self.how == "integer":
            h = h / h.shape[1]
        if self.how == "0-dim tensor":
            h = h * torch.tensor(h.shape[1] ** -0.5)
        if self.how == "padding":
            h = F.pad(h, (0, 0, 0, 0, 0, 16 - h.shape[1]))
        return self.conv2(h)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("attribute", "would not run"),
        ("scale", "a number"),
        ("integer", "a number"),
        ("0-dim tensor", "a number"),
        ("literal split", "slicing|run"),
        ("padding", "slicing|run"),
    ],
)
def test_a_forward_that_would_change_is_refused(how: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Reads(how)
    monkeypatch.setattr(
        sys.modules["diffprune_fast.tracing.trace"], "probe_plan", lambda model, walk, plan, calls: plan
    )
    plan = dpf.trace(model, X)
    assert plan.groups, "labels alone can't see it"
    (group,) = plan.groups
    keep = {group.name: np.delete(np.arange(16), [1, 10])}
    before = snapshot(model)
    with pytest.raises(SliceError, match=words):
        dpf.prune(model, plan, keep, example_inputs=X)
    assert_same(model, before)


@pytest.mark.parametrize("how", ["attribute", "scale", "literal split", "padding", "integer", "0-dim tensor"])
def test_width_that_is_read_elsewhere_is_found_when_tracing(how: str) -> None:
    plan = dpf.trace(Reads(how), X)
    assert plan.groups == ()
    assert "read elsewhere" in plan.frozen["conv1.weight:0"]


class Borrows(nn.Module):
    """A forward that views one stream with the other's width."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(5, 24), nn.Linear(7, 24)
        self.out_image, self.out_text = nn.Linear(24, 2), nn.Linear(24, 2)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        h = self.image(image)
        t = self.text(text).view(text.shape[0], -1, h.shape[-1])
        return self.out_image(h), self.out_text(t)


class BorrowsPairs(Borrows):
    """The same where one stream's channels can only go in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Linear(7, 12)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        h = self.image(image) * self.pairs(text[:, :3]).repeat(1, 1, 2)
        return self.out_image(h), self.out_text(self.text(text).reshape(text.shape[0], -1, h.shape[-1]))


def test_size_taken_from_a_tensor_of_other_units_ties_the_counts() -> None:
    inputs = (torch.empty(1, 3, 5), torch.empty(1, 4, 7))
    plan = dpf.trace(BorrowsPairs(), inputs)
    assert {g.name: g.n_units for g in plan.groups} == {"image": 12, "text": 24}
    keep = random_keep(plan, 0.5, 0)
    assert 2 * len(keep["image"]) == len(keep["text"]) == 12
    model = BorrowsPairs()
    dpf.prune(model, plan, keep, example_inputs=inputs)
    assert model(torch.randn(1, 3, 5), torch.randn(1, 4, 7))[1].shape == (1, 4, 2)


def test_size_taken_from_another_tensor_ties_the_counts() -> None:
    inputs = (torch.empty(1, 3, 5), torch.empty(1, 4, 7))
    plan = dpf.trace(Borrows(), inputs)
    assert [c.kind for c in plan.constraints] == ["size"]
    keep = random_keep(plan, 0.5, 0)
    assert len(keep["image"]) == len(keep["text"]) == 12
    model = Borrows()
    dpf.prune(model, plan, keep, example_inputs=inputs)
    assert model(torch.randn(1, 3, 5), torch.randn(1, 4, 7))[1].shape == (1, 4, 2)


def _rotate(m: dpf.tracing.Member) -> dpf.tracing.Member:
    return dataclasses.replace(m, index=np.roll(m.index, 1, axis=0))


def _planted(plan: dpf.Plan, what: str) -> dpf.Plan:
    """A plan with one mistake in it, of the kinds that tracers make."""
    groups = list(plan.groups)
    i = plan.position["down_blocks.0.resnets.0.conv1"]
    group = groups[i]
    if what == "a norm of other channels":
        members = [_rotate(m) if "norm2" in m.parameter else m for m in group.members]
    elif what == "inputs of other channels":
        members = [_rotate(m) if m.dim == 1 else m for m in group.members]
    elif what == "a forgotten member":
        members = [m for m in group.members if "time_emb_proj" not in m.parameter]
    elif what == "a place too many":
        spare = next(g for g in groups if g.name == "conv_in").members[0]
        members = [*group.members, dataclasses.replace(group.members[0], parameter=spare.parameter)]
    groups[i] = dataclasses.replace(group, members=tuple(members))
    return dataclasses.replace(plan, groups=tuple(groups))


@pytest.mark.parametrize(
    "what", ["a norm of other channels", "inputs of other channels", "a forgotten member", "a place too many"]
)
def test_gate_catches_a_plan_with_a_mistake(what: str) -> None:
    model = small_unet()
    plan, keep = pruned_state(model)
    before = snapshot(model)
    with pytest.raises(SliceError):
        dpf.prune(model, _planted(plan, what), keep, norm_groups="exact")
    assert_same(model, before)


def test_gate_catches_norm_groups_that_lose_their_members() -> None:
    """Without the plan's norm constraints an uneven choice slips past the checks; the second trace sees it."""
    model = small_unet()
    plan = dpf.trace(model)
    free = dataclasses.replace(plan, constraints=tuple([c for c in plan.constraints if c.kind != "norm"]))
    name = "down_blocks.0.resnets.0.conv1"
    uneven = np.arange(24)
    with pytest.raises(SliceError, match="norm groups"):
        dpf.prune(model, free, {name: uneven}, norm_groups="exact")
    dpf.prune(model, plan, {name: uneven}, norm_groups="count")
    assert model.down_blocks[0].resnets[0].norm2.num_channels == 24


def test_copy_keeps_gradients_of_the_original() -> None:
    model = small_condition_unet()
    plan, keep = pruned_state(model)
    original = copy.deepcopy(model)
    result = dpf.prune(model, plan, keep, norm_groups="exact", inplace=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters()))
    assert sum(p.numel() for p in result.model.parameters()) == result.after.params < result.before.params


def test_copy_with_an_optimizer_is_refused() -> None:
    model = small_unet()
    plan, keep = pruned_state(model)
    with pytest.raises(SliceError, match="inplace=False"):
        dpf.prune(model, plan, keep, inplace=False, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.Adam, {"amsgrad": True}), (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})]
)
def test_moments_follow_the_softmax_scale_as_gradients_do(kind: Any, options: dict[str, Any]) -> None:
    model = Transformer()
    weight = model.blocks[0].qkv[0].weight
    optimizer = kind(model.parameters(), **options)
    model(*IDS).square().mean().backward()
    optimizer.step()
    powers = {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2, "momentum_buffer": -1}
    before = {k: v.clone() for k, v in optimizer.state[weight].items() if k in powers}
    assert before
    heads = np.concatenate([8 * h + np.arange(2) for h in range(4)])
    keep = {"blocks.0.qkv.0": heads, "blocks.0.qkv.2": heads}
    dpf.prune(model, dpf.trace(model, IDS), keep, optimizer=optimizer, example_inputs=IDS)
    for name, moment in before.items():
        torch.testing.assert_close(optimizer.state[weight][name], moment[heads] * (2 / 8) ** (powers[name] / 2))
    model(*IDS).square().mean().backward()
    optimizer.step()


def test_state_of_another_shape_is_refused_only_where_it_would_be_sliced() -> None:
    model = small_unet()
    plan, keep = pruned_state(model)
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.randn(1, 3, 16, 16), 1).sample.mean().backward()
    optimizer.step()
    before = snapshot(model)
    with pytest.raises(SliceError, match=r"Adafactor keeps '\w+' of [\w.]+ in another shape"):
        dpf.prune(model, plan, keep, norm_groups="exact", optimizer=optimizer)
    assert_same(model, before)
    dpf.prune(model, plan, {}, optimizer=optimizer)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = small_unet()
    plan, keep = pruned_state(model)
    other = torch.optim.SGD(small_unet().parameters(), lr=0.1)
    before = snapshot(model)
    with pytest.raises(SliceError, match=r"the optimizer \(SGD\) holds none of the parameters of UNet2DModel"):
        dpf.prune(model, plan, keep, norm_groups="exact", optimizer=other)
    assert_same(model, before)


def test_dry_run_says_what_would_come_out() -> None:
    model = small_unet()
    plan, keep = pruned_state(model)
    before = snapshot(model)
    sliced = dpf.slicing.dry_run(model, plan, keep, norm_groups="exact")
    assert_same(model, before)
    dpf.prune(model, plan, keep, norm_groups="exact")
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == sliced.shapes


class TwoAttentions(nn.Module):
    """Queries that serve two attentions, as in video models with text and image keys."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(5, 32)
        self.q, self.out = nn.Linear(32, 32), nn.Linear(32, 3)
        self.keys = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])
        self.values = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj_in(x)

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (4, -1)).transpose(1, 2)

        q = heads(self.q(h))
        both = [F.scaled_dot_product_attention(q, heads(k(h)), heads(v(h))) for k, v in zip(self.keys, self.values)]
        return self.out((both[0] + both[1]).transpose(1, 2).flatten(2))


def test_shared_queries_take_the_softmax_scale_once() -> None:
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    result = assert_exact(TwoAttentions(), lambda m: m(x), ratio=0.4, example_inputs=(torch.empty(1, 6, 5),))
    assert len(result.plan.scale_fixes) == 1


class HiddenNumber(nn.Module):
    """A number that follows a width and meets no channel: nothing at the failing operation names the culprit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.a(x))
        temperature = torch.ones(1, 1, device=x.device) * h.shape[-1]
        return self.c(F.silu(self.b(h))) * temperature


def test_culprit_that_no_operation_names_is_found_by_halving() -> None:
    plan = dpf.trace(HiddenNumber(), (torch.empty(1, 4),))
    assert [g.name for g in plan.groups] == ["b"]
    assert "read elsewhere" in plan.frozen["a.weight:0"]


@pytest.mark.parametrize("units", ["dims", "heads"])
def test_other_attention_processors_compute_the_same_after_pruning(units: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=12,
    )
    model = model.double().eval()
    plan = dpf.trace(model, units=units)
    scores = np.random.default_rng(0).random(plan.n_units)
    result = dpf.prune(model, plan, dpf.select(plan, scores, ratio=0.4, round_to=1).keep)
    inputs = torch.randn(2, 4, 8, 8).double(), torch.tensor([3, 7]), torch.randn(2, 5, 12).double()
    attention = model.mid_block.attentions[0].transformer_blocks[0].attn1
    assert attention.inner_dim < 32
    assert attention.scale == (attention.inner_dim // attention.heads) ** -0.5
    result.save_pretrained(tmp_path)
    with torch.no_grad():
        want = model(*inputs).sample
        for smaller in (model, dpf.from_pretrained(tmp_path)):
            for processor in (AttnProcessor(), SlicedAttnProcessor(1), AttnProcessor2_0()):
                smaller.set_attn_processor(processor)
                assert torch.allclose(smaller(*inputs).sample, want, rtol=0, atol=1e-12), type(processor)
