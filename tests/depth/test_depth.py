"""Whole residual blocks: found, scored and dropped; a model without one computes what it would with its branch zero."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import CASES, Case, Transformer, small_unet
from oracle import randomised
from torch import Tensor, nn
from zoo import ZOO

import diffprune_fast as dpf
from diffprune_fast.checkpoint import CheckpointError
from diffprune_fast.depth import DepthError, find_blocks
from diffprune_fast.pruned import Passthrough
from diffprune_fast.selection import BudgetError

BY_NAME = {c.name: c for c in [*CASES, *ZOO]}
MID = "mid_block.resnets.1"


def made(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return randomised(case.make(), 0)


def shallow_unet(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return small_unet(block_out_channels=(16, 32), down_block_types=("DownBlock2D",) * 2,
                      up_block_types=("UpBlock2D",) * 2, **changes)  # fmt: skip


def assert_same(case: Case, one: nn.Module, two: nn.Module) -> None:
    """Equal weights to the bit, equal outputs to rounding: libraries choose kernels by address and threads."""
    a, b = one.state_dict(), two.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    torch.testing.assert_close(case.run(one), case.run(two))


def pictures(n: int = 8, *, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1]


def with_zero_branch(model: nn.Module, name: str) -> nn.Module:
    twin = copy.deepcopy(model)
    for p in twin.get_submodule(name).parameters():
        nn.init.zeros_(p)
    return twin


@pytest.mark.parametrize(
    ("case", "name", "kept_its_place"),
    [
        ("UNet2DModel-heads", "down_blocks.1.attentions.0", True),
        ("UNet2DModel-heads", "mid_block", True),
        ("UNet2DConditionModel", "up_blocks.1.attentions.0", True),
        ("AutoencoderKL", "decoder.up_blocks.0.resnets.1", True),
        ("Transformer", "blocks.1", True),
        ("HunyuanDiT2DModel", "blocks.0", True),
        ("UVit2DModel", "transformer_layers.1", False),
        ("PixArtTransformer2DModel", "transformer_blocks.0", False),
        ("SD3Transformer2DModel-3", "transformer_blocks.1", False),
        ("FluxTransformer2DModel", "transformer_blocks.0", False),
        ("FluxTransformer2DModel", "single_transformer_blocks.1", False),
    ],
)
def test_a_dropped_block_is_a_branch_of_zeros(case: str, name: str, kept_its_place: bool) -> None:
    of = BY_NAME[case]
    model = made(of)
    with torch.no_grad():
        dense, want = of.run(model), of.run(with_zero_branch(model, name))
        result = dpf.drop_blocks(model, name, example_inputs=of.example_inputs)
        got = of.run(model)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)  # not bit for bit: a zero added may change strides
    assert not torch.allclose(got, dense, rtol=1e-6)
    assert any(isinstance(m, Passthrough) for m in model.modules()) == kept_its_place
    assert result.dropped == (name,)
    assert result.after.params == sum(p.numel() for p in model.parameters()) < result.before.params


def test_what_a_forward_looks_into_is_no_block() -> None:
    """DiT takes the time embedding of its first block for its last norm."""
    case = BY_NAME["DiTTransformer2DModel"]
    names = [b.name for b in find_blocks(made(case), case.example_inputs)]
    assert "transformer_blocks.0" not in names
    assert "transformer_blocks.1" in names


def test_a_resnet_with_a_convolution_in_its_shortcut_is_no_block() -> None:
    names = {b.name for b in find_blocks(small_unet())}
    assert "down_blocks.0.resnets.0" in names
    assert not {"down_blocks.1.resnets.0", "up_blocks.0.resnets.0", "conv_in"} & names


def test_blocks_know_their_parameters_and_macs() -> None:
    model = shallow_unet()
    block = next(b for b in find_blocks(model) if b.name == MID)
    without = dpf.drop_blocks(model, MID, inplace=False)
    assert block.params == without.before.params - without.after.params
    assert block.macs == without.before.macs - without.after.macs > 0


def test_products_with_zeros_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["FluxTransformer2DModel"]
    model = made(case)
    short = find_blocks(model, case.example_inputs)
    monkeypatch.setattr("diffprune_fast.depth.residual._ZeroProducts._vanishes", staticmethod(lambda *_: False))
    assert find_blocks(model, case.example_inputs) == short
    assert len(short) == 4


class Recorded:
    """A loss that remembers what it was called with, and can be taken again with a gate on a block's branch."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Tensor, Tensor]] = []

    def __call__(self, model: nn.Module, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        self.calls.append((batch, t, noise))
        return self.loss(model, self.calls[-1])

    def loss(self, model: nn.Module, call: tuple[Any, Tensor, Tensor]) -> Tensor:
        batch, t, noise = call
        return (model(batch + 0.1 * noise, t).sample - noise).square().flatten(1).mean(1)

    def gated(self, model: nn.Module, name: str, gate: float, call: Any) -> float:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return args[0] + gate * (out - args[0])

        handle = model.get_submodule(name).register_forward_hook(hook)
        with torch.no_grad():
            loss = float(self.loss(model, call).mean())
        handle.remove()
        return loss


def test_first_order_costs_are_the_derivatives_of_a_gate_on_each_branch() -> None:
    model, seen, step = shallow_unet().double().eval(), Recorded(), 1e-5
    scores = dpf.score_blocks(
        model, pictures(dtype=torch.float64), loss_fn=seen, samples=8, micro_batch=4, threshold=None, progress=False
    )
    names = [b.name for b in scores.blocks]
    for name in ("mid_block", "mid_block.attentions.0", MID, "down_blocks.0.resnets.0"):
        slopes = [
            (seen.gated(model, name, 1 + step, call) - seen.gated(model, name, 1 - step, call)) / (2 * step)
            for call in seen.calls
        ]
        cost = scores.costs[names.index(name)]
        assert cost == pytest.approx(np.abs(slopes).mean(), rel=1e-5)
        assert cost > 0


def test_measured_costs_are_the_rise_of_the_loss() -> None:
    model, seen = shallow_unet().double().eval(), Recorded()
    options: dict[str, Any] = {"loss_fn": seen, "samples": 4, "threshold": None, "progress": False}
    scores = dpf.score_blocks(model, pictures(dtype=torch.float64), method="loss", **options)
    call = seen.calls[0]
    for block, cost in zip(scores.blocks, scores.costs):
        with torch.no_grad():
            twin = with_zero_branch(model, block.name)
            rise = float(seen.loss(twin, call).mean() - seen.loss(model, call).mean())
        assert cost == pytest.approx(rise, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("method", ["first-order", "loss"])
def test_scoring_blocks_leaves_the_model_as_it_was(method: str) -> None:
    model = shallow_unet().train()
    model.conv_in.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    modules = [(n, id(m)) for n, m in model.named_modules()]
    random_state = torch.get_rng_state()
    dpf.score_blocks(model, pictures(), samples=8, method=method, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values()))
    assert [(n, id(m)) for n, m in model.named_modules()] == modules
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv_in.weight"]
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_equal_seeds_give_equal_costs_and_a_readable_table() -> None:
    model = shallow_unet()
    first, second = (dpf.score_blocks(model, pictures(), samples=16, seed=3, progress=False) for _ in range(2))
    np.testing.assert_allclose(first.costs, second.costs, rtol=1e-4)
    assert MID in str(first)
    assert "16 samples" in str(first)


def test_the_cheapest_blocks_are_not_inside_one_another() -> None:
    scores = dpf.score_blocks(shallow_unet(), pictures(), samples=8, progress=False)
    chosen = scores.cheapest(3)
    assert not any(a.holds(b) for a in chosen for b in chosen)
    with pytest.raises(ValueError, match="give a number from 1 to"):
        scores.cheapest(99)


def test_a_nan_in_a_block_is_named() -> None:
    def loss_fn(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return model(batch, t).sample.square().mean() * float("nan")

    with pytest.raises(FloatingPointError, match="timesteps"):
        dpf.score_blocks(shallow_unet(), pictures(), loss_fn=loss_fn, samples=4, threshold=None, progress=False)


@pytest.mark.parametrize("drop", [1, MID, [MID, "mid_block.resnets.0"]])
def test_depth_goes_before_width(drop: Any) -> None:
    model = shallow_unet()
    before = sum(p.numel() for p in model.parameters())
    result = dpf.score_and_prune(
        model, pictures(), macs=0.6, drop_blocks=drop, max_samples=64, round_to=1, progress=False
    )
    assert result.before.params == before
    assert 0.5 < result.after.macs / result.before.macs <= 0.6
    assert len(result.dropped) == (2 if isinstance(drop, list) else 1)
    assert (result.blocks is not None) == isinstance(drop, int)
    assert result.dropped[0] in str(result)
    assert model(pictures()[0], torch.tensor(5)).sample.shape == (8, 3, 8, 8)


def test_no_block_is_dropped_unasked() -> None:
    model = shallow_unet()
    modules = [n for n, _ in model.named_modules()]
    result = dpf.score_and_prune(model, None, criterion="magnitude", ratio=0.3)
    assert [n for n, _ in model.named_modules()] == modules
    assert result.dropped == ()
    assert result.blocks is None


@pytest.mark.parametrize("name", ["SD3Transformer2DModel-3", "UNet2DModel-heads"])
def test_an_error_after_dropping_leaves_the_model_as_it_was(name: str) -> None:
    case = BY_NAME[name]
    model = made(case)
    block = "transformer_blocks.1" if name.startswith("SD3") else MID
    modules = [(n, id(m)) for n, m in model.named_modules()]
    config, want = dict(model.config), case.run(model)  # type: ignore[arg-type]
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(BudgetError, match="params=1,000"):
        dpf.score_and_prune(
            model, None, criterion="magnitude", params=1000, drop_blocks=block, example_inputs=case.example_inputs
        )
    assert [(n, id(m)) for n, m in model.named_modules()] == modules
    assert dict(model.config) == config  # type: ignore[arg-type]
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    torch.testing.assert_close(case.run(model), want)


@pytest.mark.parametrize("width", [None, 0.3])
def test_a_checkpoint_without_blocks_loads_as_it_was_saved(tmp_path: Path, width: float | None) -> None:
    case = BY_NAME["UNet2DModel-heads"]
    model = made(case)
    if width is None:
        result = dpf.drop_blocks(model, ["mid_block", "down_blocks.0.resnets.0"])
    else:
        result = dpf.score_and_prune(model, None, criterion="random", ratio=width, drop_blocks=[MID])
    result.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"diffprune_fast\.from_pretrained"):  # its blocks would be at random
        type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    loaded = dpf.from_pretrained(tmp_path)
    assert_same(case, loaded, model)
    again = dpf.score_and_prune(loaded, None, criterion="random", ratio=0.3)
    again.save_pretrained(tmp_path / "again")
    assert_same(case, dpf.from_pretrained(tmp_path / "again"), loaded)


def test_a_plain_module_without_a_block_loads_into_the_unpruned_one(tmp_path: Path) -> None:
    case = BY_NAME["Transformer"]
    model = made(case)
    dpf.drop_blocks(model, "blocks.0", example_inputs=case.example_inputs).save_pretrained(tmp_path)
    loaded = dpf.from_pretrained(tmp_path, Transformer())
    assert_same(case, loaded, model)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel-3"])
def test_a_closed_up_transformer_is_its_class_with_a_shorter_config(tmp_path: Path, name: str) -> None:
    case = BY_NAME[name]
    model = made(case)
    dpf.drop_blocks(model, "transformer_blocks.0", example_inputs=case.example_inputs).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_layers"] == len(model.transformer_blocks) == len(made(case).transformer_blocks) - 1  # type: ignore[arg-type]
    plain = type(model).from_pretrained(tmp_path, torch_dtype=torch.float64)  # type: ignore[attr-defined]
    assert_same(case, plain, model)
    assert_same(case, dpf.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    "dropped",
    [
        {"nowhere": "x"},
        {"": "sample"},
        {"conv_in": "input"},
        {"conv_act": "input"},
        {MID: "nothing"},
        {MID: 5},
        {"mid_block.resnets": "x"},
    ],
)
def test_a_checkpoint_that_drops_what_it_cannot_is_refused(tmp_path: Path, dropped: dict[str, Any]) -> None:
    dpf.drop_blocks(shallow_unet(), MID).save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / "diffprune.json").read_text())
    manifest["dropped"] = {**manifest["dropped"], **dropped}
    (tmp_path / "diffprune.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        dpf.from_pretrained(tmp_path)


def test_dropped_parameters_leave_the_optimizer() -> None:
    model = shallow_unet()
    optimizer = torch.optim.Adam(model.parameters())
    model(pictures()[0], torch.tensor(5)).sample.square().mean().backward()
    optimizer.step()
    dpf.score_and_prune(model, None, criterion="random", ratio=0.3, drop_blocks=MID, optimizer=optimizer)
    here = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == here
    assert {id(p) for p in optimizer.state} <= here
    model(pictures()[0], torch.tensor(5)).sample.square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"drop_blocks": "mid_block.resnets.7"}, DepthError, "is it 'mid_block.resnets"),
        ({"drop_blocks": "conv_in"}, DepthError, "no residual block"),
        ({"drop_blocks": 99, "loader": pictures(), "max_samples": 4}, ValueError, "give a number from 1 to"),
        ({"drop_blocks": True}, TypeError, "a number of blocks"),
        ({"drop_blocks": MID, "inplace": False, "optimizer": 1}, ValueError, "original's parameters"),
        ({"drop_blocks": MID, "plan": 1}, ValueError, "leave out plan"),
        ({"drop_blocks": MID, "macs": 2, "ratio": 0.3}, ValueError, "give one budget"),
    ],
)
def test_what_cannot_be_dropped_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = shallow_unet()
    modules = [(n, id(m)) for n, m in model.named_modules()]
    with pytest.raises(error, match=message):
        dpf.score_and_prune(model, arguments.pop("loader", None), progress=False, **arguments)
    assert [(n, id(m)) for n, m in model.named_modules()] == modules


def test_a_model_without_residual_blocks_says_so() -> None:
    case = BY_NAME["GroupedCNN"]
    with pytest.raises(ValueError, match="no residual block"):
        dpf.score_blocks(
            case.make(), pictures(), loss_fn=lambda m, b, t, n: m(b).mean(), example_inputs=case.example_inputs
        )
