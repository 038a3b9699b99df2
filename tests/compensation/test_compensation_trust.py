"""The dense model is only read; the pruned one has its sliced weights until the end, and after whatever goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from planted import Kept, Two, conv_case, double, image, sliced, without
from processes import run_ranks
from torch import Tensor, nn

from diffprune_fast.compensation import Compensation, compensate, estimates
from diffprune_fast.compensation import solve as solve_room
from diffprune_fast.compensation.compensate import put


class Denoiser(nn.Module):
    """Three layers that lose inputs, a dropout and the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 12, 3, padding=1)
        self.time = nn.Linear(1, 12)
        self.middle = nn.Conv2d(12, 12, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.deep = nn.Conv2d(12, 12, 1)
        self.conv_out = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = torch.tanh(self.conv_in(sample) + self.time(timestep[:, None].to(sample) / 1000)[:, :, None, None])
        h = torch.tanh(self.deep(self.drop(torch.tanh(self.middle(h)))))
        return self.conv_out(h)


GONE = {"conv_in": [1, 5], "middle": [0, 7], "deep": [3]}
READERS = {"conv_in": "middle", "middle": "deep", "deep": "conv_out"}


def pair(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Kept]:
    dense = double(Denoiser())
    kept: Kept = {}
    for name, gone in GONE.items():
        k = without(gone, 12)
        kept |= {(f"{name}.weight", 0): k, (f"{name}.bias", 0): k, (f"{READERS[name]}.weight", 1): k}
    kept |= {("time.weight", 0): kept["conv_in.weight", 0], ("time.bias", 0): kept["conv_in.weight", 0]}
    return dense.to(dtype), sliced(dense, kept).to(dtype), kept


def towards_dense(dense: nn.Module) -> Callable[..., Tensor]:
    """A loss that random models can get lower: the distance to what the dense one answers."""

    def loss(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = WHOLE(batch + noise, t)
        return (model(batch + noise, t) - wanted).square().flatten(1).mean(1)

    return loss


WHOLE = pair()[0].eval()


def run(pruned: nn.Module, dense: nn.Module, kept: Kept, **options: Any) -> Compensation:
    options = {"loss_fn": towards_dense(WHOLE), "samples": 12, "progress": False, **options}
    return compensate(pruned, dense, [image(20)], kept=kept, **options)


def contents(model: nn.Module) -> list[Any]:
    return [(n, id(p), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()]


def untouched(model: nn.Module, before: list[Any]) -> bool:
    now = contents(model)
    return len(now) == len(before) and all(
        (a[0], a[1], a[3]) == (b[0], b[1], b[3]) and torch.equal(a[2], b[2]) for a, b in zip(now, before)
    )


def hooks(*models: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models for m in model.modules())


def test_the_loss_falls_and_the_result_says_so() -> None:
    dense, pruned, kept = pair()
    found = run(pruned, dense, kept)
    assert found.helped
    assert found.dense < found.compensated < 0.6 * found.sliced
    assert found.layers == ("middle", "deep", "conv_out")
    assert f"compensated {found.compensated:.4g}; 3 layers, full" in str(found)


def test_everything_but_the_solved_weights_is_as_it_was() -> None:
    dense, pruned, kept = pair()
    whole, before = contents(dense), {n: p.detach().clone() for n, p in pruned.named_parameters()}
    identities = {n: id(p) for n, p in pruned.named_parameters()}
    pruned.train()
    pruned.middle.eval()
    modes = [m.training for m in pruned.modules()]
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    found = run(pruned, dense, kept)
    assert torch.equal(torch.rand(1), wanted)
    assert untouched(dense, whole)
    assert [m.training for m in pruned.modules()] == modes
    assert dense.training
    assert identities == {n: id(p) for n, p in pruned.named_parameters()}
    changed = {n for n, p in pruned.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{layer}.{leaf}" for layer in found.layers for leaf in ("weight", "bias")}
    assert hooks(dense, pruned) == 0


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("layer", ["middle", "deep", "conv_out"])
@pytest.mark.parametrize("model", ["pruned", "dense"])
def test_an_error_at_any_layer_leaves_the_sliced_weights(layer: str, model: str, error: type) -> None:
    dense, pruned, kept = pair()
    calls = 0
    # the call in which the pruned model is solved (a loss before it), and the dense one recorded (one sample, a loss)
    at = {"pruned": 2, "dense": 3}[model]

    def fail(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error("stop")

    broken = {"pruned": pruned, "dense": dense}[model]
    handle = broken.get_submodule(layer).register_forward_pre_hook(fail)
    before = contents(pruned), contents(dense)
    with pytest.raises(error):
        run(pruned, dense, kept)
    handle.remove()
    assert untouched(pruned, before[0])
    assert untouched(dense, before[1])
    assert hooks(dense, pruned) == 0
    assert pruned.training


def test_a_lack_of_memory_while_solving_leaves_the_sliced_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned, kept = pair()
    before, solved, calls = contents(pruned), torch.linalg.cholesky_ex, 0

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("no memory left")
        return solved(*args)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", full)
    with pytest.raises(torch.OutOfMemoryError):
        run(pruned, dense, kept)
    assert calls == 3
    assert untouched(pruned, before)


def test_an_interrupt_while_weights_are_copied_takes_them_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = pair()[1]
    before = contents(pruned)
    weights = {
        n: (torch.zeros_like(m.weight), torch.zeros_like(m.bias))
        for n, m in ((n, pruned.get_submodule(n)) for n in ("middle", "deep", "conv_out"))
    }
    weights["conv_out"] = (torch.zeros(2, 2), None)  # doesn't fit: copying fails at the last layer
    with pytest.raises(RuntimeError):
        put(pruned, weights)
    assert untouched(pruned, before)


def test_where_the_loss_is_not_lower_the_sliced_weights_stay() -> None:
    dense, pruned, kept = pair()

    def other(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Lowest for the sliced model's own answers."""
        return (model(batch, t) - reference(batch, t)).square().flatten(1).mean(1)

    reference = sliced(pruned, {}).eval()
    before = contents(pruned)
    found = run(pruned, dense, kept, loss_fn=other)
    assert not found.helped
    assert found.compensated > found.sliced == 0
    assert untouched(pruned, before)
    assert "not lower: the sliced weights stay" in str(found)


def test_the_same_seed_gives_the_same_weights() -> None:
    found = []
    for seed in (3, 3, 4):
        dense, pruned, kept = pair()
        run(pruned, dense, kept, seed=seed)
        found.append(pruned.conv_out.weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert (found[0] - found[2]).abs().max() > 1e-6


# Layers that are left alone


def left_alone(change: Callable[[nn.Module], None]) -> Compensation:
    dense, pruned, kept = pair()
    before = dict(contents_by_name(pruned))
    change(pruned)
    found = run(pruned, dense, kept)
    for name in found.alone:
        assert torch.equal(pruned.get_submodule(name).weight, before[f"{name}.weight"])
    return found


def contents_by_name(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, p.detach().clone()) for n, p in model.named_parameters()]


def test_frozen_layers_are_left_alone() -> None:
    found = left_alone(lambda m: m.deep.weight.requires_grad_(False))
    assert found.alone == {"deep": "frozen: requires_grad=False"}
    assert found.layers == ("middle", "conv_out")


def test_a_model_that_is_frozen_as_a_whole_is_solved() -> None:
    assert left_alone(lambda m: m.requires_grad_(False)).alone == {}


def test_layers_of_another_class_are_left_alone() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    def change(m: nn.Module) -> None:
        m.deep.__class__ = Own

    assert left_alone(change).alone == {"deep": "its class, Own, computes something of its own"}


def test_tied_weights_are_left_alone() -> None:
    dense = double(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)))
    dense[2].weight = dense[1].weight
    k = without(2, 6)
    places = ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    kept = {**{(n, 0): k for n in places}, ("1.weight", 1): k, ("3.weight", 1): k}
    pruned = sliced(dense, kept)
    pruned[2].weight = pruned[1].weight
    x = torch.randn(40, 4, dtype=torch.float64)
    found = compensate(pruned, dense, kept=kept, calibration=[(x,)], progress=False)
    assert found.alone == {"1": "tied weights"}
    assert found.layers == ("3",)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (lambda: nn.ConvTranspose2d(8, 5, 3), "a transposed convolution"),
        (lambda: nn.Conv2d(8, 5, 1), "constant targets"),
    ],
)
def test_reasons(second: Callable[[], nn.Module], reason: str) -> None:
    dense = double(Two(nn.Conv2d(3, 8, 3), second()))
    transposed = isinstance(dense.second, nn.ConvTranspose2d)
    if not transposed:
        nn.init.zeros_(dense.second.weight)
    k = without(2, 8)
    kept = {("first.weight", 0): k, ("first.bias", 0): k, ("second.weight", 0 if transposed else 1): k}
    found = compensate(
        sliced(dense, kept, second__in_channels=7), dense, kept=kept, calibration=[(image(),)], progress=False
    )
    assert found.alone == {"second": reason}


def test_a_layer_that_does_not_run_is_named() -> None:
    dense = double(Two(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)))
    dense.aside = nn.Conv2d(8, 5, 1).double()
    k = without(2, 8)
    kept = {("first.weight", 0): k, ("first.bias", 0): k, ("second.weight", 1): k, ("aside.weight", 1): k}
    pruned = sliced(dense, kept)
    found = compensate(pruned, dense, kept=kept, calibration=[(image(),)], progress=False)
    assert found.alone == {"aside": "not called"}


# What doesn't fit is said before anything happens


def test_kept_of_another_model_is_refused() -> None:
    dense, pruned, _kept, x = conv_case()
    with pytest.raises(ValueError, match=r"kept says that second\.weight has 5 outputs and 6 inputs"):
        compensate(pruned, dense, kept={("second.weight", 1): np.arange(6)}, calibration=[(x,)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of the two"),
        ({"calibration": []}, "calibration is empty"),
        ({"calibration": [(1,)], "mode": "half"}, "mode='half': choose one of 'auto', 'full', 'channels'"),
        ({"calibration": [(1,)], "samples": 0}, "at least one"),
        ({"calibration": [(1,)], "ridge": -1.0}, "ridge"),
        ({"calibration": [(1,)], "autocast": "fp16"}, "autocast"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    dense, pruned, kept, _ = conv_case()
    with pytest.raises(ValueError, match=message):
        compensate(pruned, dense, kept=kept, **options)


def test_calls_that_do_not_go_together_are_refused() -> None:
    dense, pruned, kept, x = conv_case()
    with pytest.raises(ValueError, match="can't be put together"):
        compensate(pruned, dense, kept=kept, calibration=[(x,), (x[..., :5],)])


# Several ranks


FEW = 400  # of 13 samples' 1053 positions


def rank_main(rank: int, ranks: int, path: str) -> None:
    torch.set_num_threads(1)
    estimates.MAX_ROWS = FEW
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    try:
        dense, pruned, kept = pair()
        found = run(pruned, dense, kept, samples=13)
        torch.save({"weights": pruned.state_dict(), "losses": (found.sliced, found.compensated)}, f"{path}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_share_the_samples_and_end_with_one_process_weights(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ranks(rank_main, 2, str(tmp_path / "store"))
    monkeypatch.setattr(estimates, "MAX_ROWS", FEW)
    dense, pruned, kept = pair()
    alone = run(pruned, dense, kept, samples=13)
    for rank in range(2):
        found = torch.load(tmp_path / f"store-{rank}.pt", weights_only=True)
        assert found["losses"] == pytest.approx((alone.sliced, alone.compensated), rel=1e-6)
        for name, p in pruned.state_dict().items():
            torch.testing.assert_close(found["weights"][name], p, rtol=1e-6, atol=1e-8)


class Branches(nn.Module):
    """Of three layers that read the first one's channels, one runs for bright inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.always, self.bright, self.last = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        y = self.always(h)
        return self.last(h) + (y + self.bright(h) if float(x.mean()) > 0 else y)


def branching_rank(rank: int, ranks: int, path: str) -> None:
    """The first rank's samples are bright, the other's are dark; and the last layer's sums overflow on one rank."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=ranks, timeout=timeout
    )
    try:
        dense = double(Branches())
        kept = {("first.weight", 0): np.arange(5), ("first.bias", 0): np.arange(5)}
        kept |= {(f"{name}.weight", 1): np.arange(5) for name in ("always", "bright", "last")}
        pruned = sliced(dense, kept)
        x = torch.rand(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x[4:8] -= 2  # of three shares of four samples the second's, which is the second rank's
        real = solve_room.solve

        def fails(problem: Any, **options: Any) -> Any:
            found = real(problem, **options)
            if rank == 1 and torch.equal(problem.weight[0], dense.last.weight[:, :5].T):
                raise ArithmeticError("on this rank only")
            return found

        solve_room.solve = fails
        found = compensate(pruned, dense, kept=kept, calibration=[(x,)], progress=False)
        torch.save(
            {"layers": found.layers, "alone": dict(found.alone), "weights": pruned.state_dict()}, f"{path}-{rank}"
        )
    finally:
        torch.distributed.destroy_process_group()


def test_what_one_rank_cannot_solve_no_rank_solves(tmp_path: Any) -> None:
    run_ranks(branching_rank, 2, str(tmp_path / "store"))
    first, second = (torch.load(tmp_path / f"store-{rank}", weights_only=True) for rank in range(2))
    assert first["layers"] == second["layers"] == ("always",)
    assert first["alone"]["bright"] == second["alone"]["bright"] == "not called"
    assert first["alone"]["last"] == "it can't be solved on another rank"
    assert second["alone"]["last"] == "on this rank only"
    for name, value in first["weights"].items():
        torch.testing.assert_close(second["weights"][name], value, rtol=0, atol=0)
