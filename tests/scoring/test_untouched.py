"""Scoring leaves no trace in the model or the process, whether it ends well or not; and its errors name the cause."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_ranks
from scoring_models import TinyDenoiser, images, tiny, tiny_plan
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffprune_fast.objective import make_objective
from diffprune_fast.objective.checks import check_weights
from diffprune_fast.objective.isolation import stand_ins
from diffprune_fast.objective.randomness import own_randomness
from diffprune_fast.scoring import score
from diffprune_fast.scoring.estimators import MicroScores, Work
from diffprune_fast.scoring.tables import unit_table

QUICK: dict[str, Any] = {"micro_batch": 4, "min_samples": 8, "max_samples": 8, "progress": False}


def lived_in() -> TinyDenoiser:
    """A model in the middle of the user's work: gradients, mixed modes, frozen parts, hooks on gradients."""
    model = tiny()
    model(images(2), torch.zeros(2)).sum().backward()
    model.train()
    model.norm.eval()
    model.conv1.weight.requires_grad_(False)
    return model


def state_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """Identity, values, gradients, flags: everything that scoring must not change."""
    found: list[tuple[Any, ...]] = [(n, m.training) for n, m in model.named_modules()]
    for name, p in model.named_parameters():
        gradient = None if p.grad is None else (id(p.grad), p.grad.clone().numpy().tobytes())
        hooks = (len(p._backward_hooks or ()), len(getattr(p, "_post_accumulate_grad_hooks", None) or ()))
        found.append(
            (name, id(p), p.data_ptr(), p.detach().numpy().tobytes(), p.requires_grad, p.is_leaf, gradient, hooks)
        )
    return found


def randomness() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()  # noqa: NPY002


def nan_loss(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    loss = model(batch, t).square().flatten(1).mean(1)
    return torch.where(t == 17, loss * float("nan"), loss)


def interrupted(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    model(batch, t)
    raise KeyboardInterrupt


WAYS: dict[str, tuple[type[BaseException] | None, dict[str, Any]]] = {
    "micro": (None, {}),
    "mean": (None, {"estimator": "mean"}),
    "reference": (None, {"estimator": "reference", "timesteps": [0, 1, 2]}),
    "magnitude": (None, {"criterion": "magnitude"}),
    "a NaN loss": (FloatingPointError, {"loss_fn": nan_loss, "timesteps": [16, 17, 18]}),
    "an interruption": (KeyboardInterrupt, {"loss_fn": interrupted, "timesteps": [0]}),
    "a bad second batch": (ValueError, {"loader": [images(4), images(4) * float("nan")], "timesteps": [0]}),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_the_model_is_as_it_was(way: tuple[type[BaseException] | None, dict[str, Any]]) -> None:
    error, options = way
    model = lived_in()
    before = state_of(model)
    options = {"loader": [images(8)], **QUICK, **options}
    loader = options.pop("loader")
    if error is None:
        score(model, loader, tiny_plan(model), **options)
    else:
        with pytest.raises(error):
            score(model, loader, tiny_plan(model), **options)
    assert state_of(model) == before


def test_the_processes_generators_are_as_they_were() -> None:
    model, before = tiny(), randomness()
    loader = torch.utils.data.DataLoader(images(8), batch_size=2, shuffle=True)
    before = randomness()
    score(model, loader, tiny_plan(model), **QUICK)
    assert randomness() == before


def test_scores_do_not_depend_on_the_users_state() -> None:
    expected = score(tiny(), [images(8)], tiny_plan(tiny()), **QUICK).values
    model, plan = lived_in(), tiny_plan(tiny())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            values = score(model, [images(8)], plan, **QUICK).values
            np.testing.assert_allclose(values, expected, rtol=1e-9)


def test_gradient_hooks_of_the_user_do_not_fire() -> None:
    model = tiny()
    fired: list[str] = []
    for p in model.parameters():
        p.register_hook(lambda g: fired.append("gradient"))
        p.register_post_accumulate_grad_hook(lambda p: fired.append("accumulated"))
    score(model, [images(8)], tiny_plan(model), **QUICK)
    assert fired == []
    model(images(2), torch.zeros(2)).sum().backward()
    assert fired.count("accumulated") > 0


def test_dropout_is_off_while_scoring() -> None:
    modes: list[bool] = []
    model = tiny().train()
    model.norm.register_forward_hook(lambda m, i, o: modes.append(m.training))
    score(model, [images(8)], tiny_plan(model), **QUICK)
    assert modes
    assert not any(modes)
    assert model.norm.training


def test_tied_parameters_share_one_stand_in() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with stand_ins(model, ("0.weight",)) as found:
        assert model[1].weight is model[0].weight is found["0.weight"]
        model(torch.ones(1, 4)).sum().backward()
        assert found["0.weight"].grad is not None
        assert not model[0].bias.requires_grad
    assert model[1].weight is model[0].weight
    assert model[0].weight.grad is None


def test_own_randomness_is_seeded_and_given_back() -> None:
    before = randomness()
    drawn = []
    for _ in range(2):
        with own_randomness(3):
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert randomness() == before


# Errors


def call(**options: Any) -> Callable[[], Any]:
    def run() -> Any:
        model = options.pop("model", None) or tiny()
        given = {**QUICK, **options}
        loader = given.pop("loader", [images(8)])
        return score(model, loader, given.pop("plan", None) or tiny_plan(tiny()), **given)

    return run


def poisoned(name: str) -> TinyDenoiser:
    model = tiny()
    dict(model.named_parameters())[name].data.view(-1)[0] = float("nan")
    return model


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "estimator": (call(estimator="fast"), ValueError, "estimator='fast': choose one of 'micro', 'mean'"),
    "criterion": (call(criterion="obd"), ValueError, "criterion='obd': choose one of 'diff-pruning'"),
    "variant": (call(estimator="reference", variant="v2"), ValueError, "variant='v2': choose one of 'paper'"),
    "variant of another estimator": (call(variant="paper"), ValueError, "variant='paper' is a reading of"),
    "threshold": (call(threshold=1.5), ValueError, "0 <= threshold < 1, not 1.5"),
    "sizes": (call(min_samples=9, max_samples=8), ValueError, "min_samples=9, max_samples=8"),
    "agreement ratio": (call(agreement_ratio=1.0), ValueError, "agreement_ratio"),
    "autocast": (call(autocast="fp16"), ValueError, "autocast is None or 'bf16', not 'fp16'"),
    "timesteps": (call(timesteps=[0, 1000]), ValueError, "integers from 0 to 999"),
    "no timesteps": (call(timesteps=[]), ValueError, "at least one"),
    "no loader": (call(loader=None), ValueError, "needs images: give a loader"),
    "empty loader": (call(loader=[]), ValueError, "the loader is empty"),
    "channels": (call(loader=[images(4, channels=1)]), ValueError, "of 3 channels, the loader yields 1"),
    "NaN image": (call(loader=[images(4) * float("nan")]), ValueError, "NaN or infinity in the loader's images"),
    "NaN weight": (call(model=poisoned("conv2.bias")), ValueError, "conv2.bias has 1 NaN or infinite values"),
    "another model": (
        call(model=nn.Conv2d(3, 3, 1)),
        ValueError,
        "the plan is not of this model: conv_in.weight .* no such parameter; trace the model again",
    ),
    "meta": (call(model=tiny().to("meta")), ValueError, "conv_in.weight is on the meta device"),
    "constant loss": (
        call(loss_fn=lambda model, batch, t, noise: noise.square().mean(), timesteps=[0]),
        ValueError,
        "doesn't depend on the model's parameters",
    ),
    "NaN loss": (call(loss_fn=nan_loss, timesteps=[17]), FloatingPointError, r"loss at timesteps \[17\]"),
    "a NaN in the curve": (
        call(loss_fn=lambda m, b, t, e: m(b, t).mean() + torch.where(t[0] > 900, float("inf"), 0.0)),
        FloatingPointError,
        "the loss at timestep 999 is inf",
    ),
    "a negative loss": (
        call(loss_fn=lambda m, b, t, e: -m(b, t).square().mean()),
        ValueError,
        "no threshold can be drawn",
    ),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS.keys())
def test_an_error_names_its_cause(case: tuple[Callable[[], Any], type[Exception], str]) -> None:
    run, kind, message = case
    with pytest.raises(kind, match=message):
        run()


class Overflow(torch.autograd.Function):
    """Forward: nothing. Backward: the gradient becomes infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * float("inf")


@pytest.mark.parametrize("estimator", ["micro", "mean", "reference"])
def test_an_infinite_gradient_names_the_parameter(estimator: str) -> None:
    class Exploding(TinyDenoiser):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            x = self.conv_in(sample)
            h = (
                Overflow.apply(self.conv1(torch.tanh(x.detach())))
                + self.time(torch.zeros_like(x[:, :4, 0, 0]))[..., None, None]
            )
            return self.conv_out(x + self.conv2(torch.tanh(self.norm(h))))

    torch.manual_seed(0)
    model = Exploding().double()
    with pytest.raises(FloatingPointError, match=r"the gradient of conv1\.(weight|bias) is NaN or infinite"):
        score(model, [images(8)], tiny_plan(model), estimator=estimator, timesteps=[0], **QUICK)


@pytest.mark.parametrize("estimator", ["micro", "mean"])
@pytest.mark.parametrize("bad", [0, 5, 11])
def test_a_nan_in_any_micro_batch_is_found_before_the_end(estimator: str, bad: int) -> None:
    """The host looks every eighth time only, and at the last: an early one and one after the last look count too."""
    calls = iter(range(1000))

    def loss_fn(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return model(batch, t).square().mean() * (float("nan") if next(calls) == bad else 1.0)

    options = {**QUICK, "micro_batch": 4, "min_samples": 48, "max_samples": 48}
    with pytest.raises(FloatingPointError, match=r"loss at timesteps \[3\]"):
        score(
            tiny(),
            [images(8)],
            tiny_plan(tiny()),
            estimator=estimator,
            loss_fn=loss_fn,
            **{**options, "timesteps": [3]},
        )


def test_an_infinite_gradient_between_two_looks_names_the_parameter() -> None:
    model = tiny()

    def loss_fn(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        out = model(batch, t)
        marked = bool((batch[0, 0, 0, 0] == 5.0).item())
        return ((Overflow.apply(model.conv_out.weight).sum() * 1e-9 if marked else 0.0) + out.square().mean()).view(())

    batches = [images(4), images(4, seed=1)]
    batches[1][0, 0, 0, 0] = 5.0
    options = {**QUICK, "micro_batch": 4, "min_samples": 48, "max_samples": 48, "timesteps": [3]}
    with pytest.raises(FloatingPointError, match=r"the gradient of conv_out\.weight is NaN or infinite"):
        score(model, batches, tiny_plan(model), loss_fn=loss_fn, **options)


class HostReads(TorchDispatchMode):
    """Counts the operations for which the host waits for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_scoring_step_reads_nothing_back_until_it_is_asked_for_sums() -> None:
    model = tiny()
    plan = tiny_plan(model)
    objective = make_objective(model)
    work = Work(
        model=model,
        plan=plan,
        objective=objective,
        batches=None,  # type: ignore[arg-type]
        parameters=dict(model.named_parameters()),
        device=torch.device("cpu"),
        seed=0,
    )
    collector = MicroScores(work, unit_table(plan), "abs")
    batch, noise, t = images(4), images(4, seed=1), torch.tensor([1, 2, 3, 4])
    with HostReads() as reads:
        for k in range(3):
            collector.add(k, lambda: work.mean_loss(batch, t, noise))
        assert reads.found == []
        collector.halves()
        work.check_losses()
    assert reads.found != []


def test_a_mask_of_infinities_is_no_broken_weight_but_a_nan_in_a_buffer_is() -> None:
    model = tiny()
    model.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    assert check_weights(model) == torch.device("cpu")
    model.mask[0] = float("nan")  # type: ignore[index,operator]
    with pytest.raises(ValueError, match="mask has 1 NaN"):
        check_weights(model)


def test_a_checked_model_tells_its_device() -> None:
    assert check_weights(tiny()) == torch.device("cpu")


# Several ranks


def plain_loss(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    return (model(batch + noise, t) - noise).square().flatten(1).mean(1)


SHARED: dict[str, Any] = {**QUICK, "max_samples": 80, "agreement": 0.0, "loss_fn": plain_loss}


def rank_main(rank: int, ranks: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    try:
        found = score(tiny(), [images(8)], tiny_plan(tiny()), **SHARED)
        np.savez(f"{path}-{rank}.npz", values=found.values, samples=found.samples, agreement=found.agreement)
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_share_the_work_and_end_with_one_process_scores(tmp_path: Any) -> None:
    run_ranks(rank_main, 2, str(tmp_path / "store"))
    alone = score(tiny(), [images(8)], tiny_plan(tiny()), **SHARED)
    assert alone.samples == 64
    for rank in range(2):
        found = np.load(tmp_path / f"store-{rank}.npz")
        np.testing.assert_allclose(found["values"], alone.values, rtol=1e-12)
        assert (int(found["samples"]), float(found["agreement"])) == (alone.samples, alone.agreement)


def test_make_objective_is_reusable_for_finetuning() -> None:
    model = tiny()
    objective = make_objective(model)
    loss = objective.loss(model, images(4), torch.tensor([1, 2, 3, 4]), images(4, 1))
    loss.backward()
    assert loss.ndim == 0
    assert model.conv1.weight.grad is not None
