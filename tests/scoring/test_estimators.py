"""Every estimator against its formula, written out with autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scoring_models import by_hand, gradients, images, tiny, tiny_plan, weights
from torch import Tensor, nn

from diffprune_fast import progress
from diffprune_fast.objective import make_objective
from diffprune_fast.objective.randomness import NOISE, TIMESTEPS, generator_for, stratified
from diffprune_fast.ops import ScoreTable
from diffprune_fast.plan import Member
from diffprune_fast.scoring import Scores, estimators, score
from diffprune_fast.scoring.estimators import GradientHooks, MicroScores, Work
from diffprune_fast.scoring.timesteps import quad_cells

SEED = 5


def falling(t: Tensor) -> Tensor:
    """A weight that makes a known loss curve: 1 at t = 0, halved every 10 timesteps."""
    return 0.5 ** (t.double() / 10)


def scored(estimator: str = "micro", model: nn.Module | None = None, **options: Any) -> Scores:
    model = tiny() if model is None else model
    given = {"micro_batch": 4, "min_samples": 12, "max_samples": 12, "progress": False, "seed": SEED, **options}
    loader = given.pop("loader", [images(8)])
    return score(model, loader, tiny_plan(model), estimator=estimator, **given)


def micro_batches(objective: Any, allowed: np.ndarray, n: int, size: int = 4) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the seed makes of 8 images, drawn for ever."""
    data = torch.cat([images(8)] * n)
    out = []
    for k in range(n):
        x = data[k * size : (k + 1) * size]
        noise = objective.noise(x, generator_for(SEED, NOISE, k))
        out.append((x, stratified(allowed, size, generator_for(SEED, TIMESTEPS, k)), noise))
    return out


def each_gradient(allowed: np.ndarray, n: int = 3) -> list[dict[str, Tensor]]:
    model = tiny()
    objective = make_objective(model)
    batches = micro_batches(objective, allowed, n)
    return [gradients(model, objective.loss(model, x, t, noise)) for x, t, noise in batches]


ALLOWED = [0, 3, 50, 51, 52, 400]


def test_micro_is_the_mean_over_micro_batches_of_abs_theta_times_gradient() -> None:
    found = scored(timesteps=ALLOWED)
    theta = weights(tiny())
    per_batch = [{n: (theta[n] * g[n]).abs() for n in theta} for g in each_gradient(np.array(ALLOWED))]
    expected = sum(by_hand(tiny_plan(tiny()), v) for v in per_batch) / 3
    np.testing.assert_allclose(found.values, expected, rtol=1e-10)
    assert found.samples == 12


def test_mean_is_abs_theta_times_the_summed_gradient() -> None:
    found = scored("mean", timesteps=ALLOWED)
    theta, each = weights(tiny()), each_gradient(np.array(ALLOWED))
    expected = by_hand(tiny_plan(tiny()), {n: (theta[n] * sum(g[n] for g in each)).abs() for n in theta}) / 3
    np.testing.assert_allclose(found.values, expected, rtol=1e-10)


def test_fisher_is_the_mean_square_of_theta_times_gradient() -> None:
    found = scored(criterion="fisher", timesteps=ALLOWED)
    theta, each = weights(tiny()), each_gradient(np.array(ALLOWED))
    expected = sum(by_hand(tiny_plan(tiny()), {n: (theta[n] * g[n]) ** 2 for n in theta}) for g in each) / 3
    np.testing.assert_allclose(found.values, expected, rtol=1e-10)


@pytest.mark.parametrize("estimator", ["micro", "mean"])
def test_taylor_is_the_abs_of_the_signed_sum_over_all_timesteps(estimator: str) -> None:
    found = scored(estimator, criterion="taylor")
    theta, each = weights(tiny()), each_gradient(np.arange(1000))
    signed = [by_hand(tiny_plan(tiny()), {n: theta[n] * g[n] for n in theta}) for g in each]
    expected = sum(np.abs(s) for s in signed) if estimator == "micro" else np.abs(sum(signed))
    np.testing.assert_allclose(found.values, expected / 3, rtol=1e-8)
    assert found.curve is None


def test_timesteps_are_drawn_where_the_curve_is_above_the_threshold() -> None:
    asked: list[int] = []

    def loss_fn(model: nn.Module, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            asked.extend(t.tolist())
        return (model(batch, t) ** 2).flatten(1).mean(1) * 0 + falling(t) + 0 * model(batch, t).sum()

    found = scored(loss_fn=loss_fn, threshold=0.25, max_samples=80, min_samples=80, damage=False)
    assert found.curve is not None
    assert len(found.curve.timesteps) == 20
    assert found.curve.threshold == 0.25
    low, high = found.curve.kept
    assert low == 0
    assert 19 <= high <= 21  # 0.5 ** 2 at t = 20, interpolated
    assert len(asked) == 80
    assert max(asked) <= high


def test_threshold_zero_keeps_all_timesteps() -> None:
    found = scored(threshold=0.0)
    assert found.curve is not None
    assert found.curve.kept == (0, 999)


def test_halves_are_the_even_and_the_odd_micro_batches() -> None:
    model = tiny()
    plan = tiny_plan(model)
    from diffprune_fast.scoring.tables import unit_table

    objective = make_objective(model)
    work = Work(
        model=model,
        plan=plan,
        objective=objective,
        batches=None,  # type: ignore[arg-type]
        parameters=dict(model.named_parameters()),
        device=torch.device("cpu"),
        seed=SEED,
    )
    collector = MicroScores(work, unit_table(plan), "abs", bucket_bytes=1)  # every gradient is a bucket of its own
    for k, (x, t, noise) in enumerate(micro_batches(objective, np.array(ALLOWED), 3)):
        collector.add(k, lambda x=x, t=t, noise=noise: objective.loss(model, x, t, noise))  # type: ignore[misc]
    theta = weights(model)
    each = [by_hand(plan, {n: (theta[n] * g[n]).abs() for n in theta}) for g in each_gradient(np.array(ALLOWED))]
    np.testing.assert_allclose(collector.halves().numpy(), [each[0] + each[2], each[1]], rtol=1e-10)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith(("unused", "conv_out.bias")))


def test_a_bucket_is_bound_once_for_all_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = []
    bind = ScoreTable.bind
    monkeypatch.setattr(ScoreTable, "bind", lambda table, *a, **k: bound.append(len(table)) or bind(table, *a, **k))
    scored(timesteps=ALLOWED)
    assert bound.count(max(bound)) == 1  # the whole of the tiny model is one bucket


def test_hooks_are_registered_once_for_all_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []
    register = torch.Tensor.register_post_accumulate_grad_hook
    monkeypatch.setattr(
        torch.Tensor,
        "register_post_accumulate_grad_hook",
        lambda p, hook: registered.append(id(p)) or register(p, hook),
    )
    scored(timesteps=ALLOWED, damage=False)
    assert registered
    assert len(registered) == len(set(registered))


def test_hooks_go_with_their_owner() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    hooks = GradientHooks({"p": p})
    told: list[str] = []
    with hooks.calling(lambda name, _: told.append(name)):
        p.sum().backward()
    p.sum().backward()
    assert told == ["p"]
    del hooks
    assert not p._post_accumulate_grad_hooks


def test_no_more_than_a_bucket_of_gradients_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffprune_fast.scoring import estimators as accumulate

    held: list[int] = []

    def watch(scores: Tensor, work: Work, *rest: Any, **options: Any) -> None:
        held.append(sum(p.grad is not None for p in work.parameters.values()))
        add_scores(scores, work, *rest, **options)

    add_scores = accumulate.add_scores
    monkeypatch.setattr(accumulate, "add_scores", watch)
    whole = scored(timesteps=ALLOWED)
    assert max(held) > 5  # the tiny model is smaller than a bucket
    held.clear()
    monkeypatch.setattr(MicroScores.__init__, "__defaults__", (1,))
    found = scored(timesteps=ALLOWED)
    assert max(held) == 1
    np.testing.assert_allclose(found.values, whole.values, rtol=1e-12)


def test_progress_shows_the_agreement(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setattr(estimators, "CHECK_EVERY", 1)
    found = scored(progress=True, timesteps=ALLOWED)
    shown = capsys.readouterr().err
    assert ", agreement=" in shown
    assert found.agreement is not None
    scored(timesteps=ALLOWED)
    assert capsys.readouterr().err == ""


def test_scoring_stops_when_the_halves_agree_twice_running() -> None:
    always = scored(agreement=0.0, max_samples=4 * 64, min_samples=4)
    assert always.samples == 4 * 16  # sixteen micro-batches, two looks
    late = scored(agreement=0.0, max_samples=4 * 64, min_samples=4 * 20)
    assert late.samples == 4 * 24  # the next look after the minimum
    never = scored(agreement=1.01, max_samples=4 * 30, min_samples=4)
    assert never.samples == 4 * 30
    assert never.agreement is not None
    assert 0.5 < never.agreement <= 1


def test_one_look_that_agrees_by_accident_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([0.95, 0.5, 0.95, 0.91, 0.99])
    monkeypatch.setattr("diffprune_fast.scoring.estimators.keep_set_agreement", lambda *_: next(looks))
    found = scored(max_samples=4 * 64, min_samples=4)
    assert found.samples == 4 * 8 * 4
    assert found.agreement == 0.91


def test_a_small_maximum_needs_no_minimum_with_it() -> None:
    assert scored(min_samples=None, max_samples=24).samples == 24
    assert scored(min_samples=None, max_samples=4096, micro_batch=64, agreement=0.0).samples == 64 * 16


def test_agreement_of_identical_micro_batches_is_one() -> None:
    def loss_fn(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return model(batch, torch.zeros_like(t)).square().mean()

    assert scored(loss_fn=loss_fn, timesteps=[0], loader=[images(4)], max_samples=16).agreement == 1.0


def test_the_same_seed_gives_the_same_scores_another_one_others() -> None:
    first, again, other = scored(), scored(), scored(seed=6)
    np.testing.assert_allclose(first.values, again.values, rtol=1e-9)
    assert not np.allclose(first.values, other.values)


def test_a_shuffling_loader_is_repeatable_too() -> None:
    def run() -> Scores:
        return scored(loader=torch.utils.data.DataLoader(images(40), batch_size=5, shuffle=True))

    torch.manual_seed(1)
    first = run()
    torch.manual_seed(2)
    np.testing.assert_allclose(first.values, run().values, rtol=1e-9)


def test_a_loader_with_a_generator_of_its_own_is_repeatable_and_gets_it_back() -> None:
    generator = torch.Generator().manual_seed(4)
    state = generator.get_state()
    loader = torch.utils.data.DataLoader(images(40), batch_size=5, shuffle=True, generator=generator)
    first = scored(loader=loader)
    assert torch.equal(generator.get_state(), state)
    np.testing.assert_allclose(scored(loader=loader).values, first.values, rtol=1e-9)


def test_frozen_channels_are_left_out_of_every_sum() -> None:
    model = tiny()
    plan = tiny_plan(model, frozen_middle=3)
    options = {"micro_batch": 4, "min_samples": 12, "max_samples": 12, "progress": False, "seed": SEED}
    found = score(model, [images(8)], plan, **options)  # type: ignore[arg-type]
    whole = scored()
    np.testing.assert_allclose(found.of(plan, "middle"), whole.of(tiny_plan(model), "middle")[3:], rtol=1e-10)
    np.testing.assert_allclose(found.of(plan, "stream"), whole.of(tiny_plan(model), "stream"), rtol=1e-10)


def test_frozen_parameters_are_scored_all_the_same() -> None:
    frozen = tiny().requires_grad_(False)
    np.testing.assert_allclose(scored(model=frozen).values, scored().values, rtol=1e-9)


def test_bf16_autocast_gives_nearly_the_same_scores() -> None:
    plain = scored(model=tiny(dtype=torch.float32))
    cast = scored(model=tiny(dtype=torch.float32), autocast="bf16")
    assert not np.allclose(cast.values, plain.values, rtol=1e-5)
    assert np.corrcoef(cast.values, plain.values)[0, 1] > 0.99


def test_a_half_precision_model_is_scored_in_its_own_dtype() -> None:
    plain = scored(model=tiny(dtype=torch.float32))
    half = scored(model=tiny(dtype=torch.float32).to(torch.bfloat16))
    assert np.corrcoef(half.values, plain.values)[0, 1] > 0.98


def test_channels_last_gives_the_same_scores() -> None:
    found = scored(model=tiny().to(memory_format=torch.channels_last))
    np.testing.assert_allclose(found.values, scored().values, rtol=1e-9)


def test_magnitude_is_the_l2_norm_of_the_units_weights_and_needs_no_loader() -> None:
    model = tiny()
    found = score(model, None, tiny_plan(model), criterion="magnitude")
    expected = np.sqrt(by_hand(tiny_plan(model), {n: p**2 for n, p in weights(model).items()}))
    np.testing.assert_allclose(found.values, expected, rtol=1e-10)
    assert (found.estimator, found.samples, found.agreement) == ("none", 0, None)


def test_random_is_seeded_and_needs_no_loader() -> None:
    model = tiny()
    one, same, other = (score(model, None, tiny_plan(model), criterion="random", seed=s).values for s in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert len(np.unique(one)) == len(one)


# The reference's loop


def decaying(scale: float = 1.0) -> Callable[..., Tensor]:
    """A loss whose value at t is ``falling(t)`` times that of t = 0, whatever the model: stops are known exactly."""

    def loss_fn(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        error = (model(batch, torch.zeros_like(t)) - noise).square().flatten(1).mean(1)
        return scale * error * falling(t)

    return loss_fn


def gradient_at_zero() -> dict[str, Tensor]:
    model = tiny()
    x = images(8)
    noise = make_objective(model).noise(x, generator_for(SEED, NOISE, 0))
    return gradients(model, (model(x, torch.zeros(8)) - noise).square().mean())


def expected_of_sum(factor: float, element: str = "abs", counts: Callable[[Member], bool] | None = None) -> np.ndarray:
    theta, g = weights(tiny()), gradient_at_zero()
    products = {n: (factor * theta[n] * g[n]).abs() for n in theta}
    if element == "square":
        products = {n: p**2 for n, p in products.items()}
    return by_hand(tiny_plan(tiny()), products, counts)


def falling_sum(stop: int) -> float:
    return float(falling(torch.arange(stop)).sum())


def test_reference_stops_before_the_first_timestep_below_the_threshold() -> None:
    # 0.5 ** (t / 10) < 0.05 from t = 44 on
    found = scored("reference", loss_fn=decaying())
    np.testing.assert_allclose(found.values, expected_of_sum(falling_sum(44)), rtol=1e-9)
    assert found.samples == 44 * 8
    assert found.curve is not None
    assert found.curve.timesteps.tolist() == list(range(45))


def test_reference_takes_its_first_batch_only() -> None:
    found = scored("reference", loss_fn=decaying(), loader=[images(8), images(8, seed=9)])
    np.testing.assert_allclose(found.values, expected_of_sum(falling_sum(44)), rtol=1e-9)


def test_timesteps_that_share_a_pass_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"timesteps": list(range(0, 60, 2))}
    shared = scored("reference", **options)
    monkeypatch.setattr(
        "diffprune_fast.scoring.reference_loop.OneBatch.passes", lambda self, cells: ([c] for c in cells)
    )
    alone = scored("reference", **options)
    np.testing.assert_allclose(shared.values, alone.values, rtol=1e-9)
    assert shared.samples == alone.samples


def test_a_scalar_loss_walks_one_timestep_per_pass() -> None:
    per_sample = decaying()
    found = scored("reference", loss_fn=lambda m, b, t, e: per_sample(m, b, t, e).mean())
    np.testing.assert_allclose(found.values, expected_of_sum(falling_sum(44)), rtol=1e-9)


def test_the_maximum_is_the_running_one() -> None:
    def loss_fn(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        level = torch.where(t < 3, 1.0, torch.where(t < 5, 100.0, 2.0)).double()
        return (model(batch, torch.zeros_like(t)) - noise).square().flatten(1).mean(1) * level

    found = scored("reference", loss_fn=loss_fn)
    assert found.samples == 5 * 8  # 2 < 0.05 * 100 at t = 5
    np.testing.assert_allclose(found.values, expected_of_sum(3 + 200), rtol=1e-9)


def test_variant_ddpm_prune_adds_the_last_step_leaves_vectors_out_and_divides_by_the_mean() -> None:
    found = scored("reference", loss_fn=decaying(), variant="ddpm_prune")
    plan = tiny_plan(tiny())
    values = expected_of_sum(
        falling_sum(45), counts=lambda m: m.parameter.endswith("weight") and "norm" not in m.parameter
    )
    for start, stop in zip(plan.offsets[:-1], plan.offsets[1:]):
        values[start:stop] /= values[start:stop].mean()
    np.testing.assert_allclose(found.values, values, rtol=1e-9)
    assert found.samples == 45 * 8


def test_variant_ddpm_exp_squares_sums_pixels_and_adds_the_norms_abs() -> None:
    model = tiny()
    x = images(8)
    found = scored("reference", variant="ddpm_exp", timesteps=[0])
    objective = make_objective(model)
    noise = objective.noise(x, generator_for(SEED, NOISE, 0))
    g = gradients(model, objective.loss(model, x, 0, noise) * x[0].numel())
    theta = weights(model)
    plan = tiny_plan(model)
    squares = by_hand(
        plan,
        {n: (theta[n] * g[n]) ** 2 for n in theta},
        lambda m: m.parameter.endswith("weight") and m.parameter != "norm.weight",
    )
    norms = by_hand(plan, {n: (theta[n] * g[n]).abs() for n in theta}, lambda m: m.parameter == "norm.weight")
    np.testing.assert_allclose(found.values, squares + norms, rtol=1e-9)


def test_variant_ldm_exp_has_its_own_threshold_and_no_norms() -> None:
    found = scored("reference", loss_fn=decaying(), variant="ldm_exp")
    # 0.5 ** (t / 10) < 0.1 from t = 34 on
    expected = expected_of_sum(
        falling_sum(34), counts=lambda m: m.parameter.endswith("weight") and "norm" not in m.parameter
    )
    np.testing.assert_allclose(found.values, expected, rtol=1e-9)
    assert scored("reference", loss_fn=decaying(), variant="ldm_exp", threshold=0.05).samples == 44 * 8


def test_variant_paper_takes_the_set_and_not_the_prefix() -> None:
    def loss_fn(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        level = torch.where((t < 3) | (t >= 996), 1.0, 0.01).double()
        return (model(batch, torch.zeros_like(t)) - noise).square().flatten(1).mean(1) * level

    found = scored("reference", loss_fn=loss_fn, variant="paper")
    np.testing.assert_allclose(found.values, expected_of_sum(7), rtol=1e-9)
    assert scored("reference", loss_fn=loss_fn).samples == 3 * 8


def test_a_member_that_a_unit_touches_more_often_is_left_out_of_ddpm_exp() -> None:
    model = tiny()
    plan = tiny_plan(model)
    stream, middle = plan.groups
    doubled = Member("conv_out.weight", 1, np.arange(12).reshape(6, 2))
    singles = [Member(m.parameter, m.dim, np.arange(6).reshape(6, 1)) for m in stream.members[:-1]]
    mixed = type(plan)("T", (type(stream)("stream", 6, (*singles, doubled)), middle), (), {}, plan.shapes)
    options = {"estimator": "reference", "timesteps": [0], "seed": SEED, "progress": False}
    found = score(model, [images(8)], mixed, variant="ddpm_exp", **options)  # type: ignore[arg-type]
    without = type(plan)("T", (type(stream)("stream", 6, tuple(singles)), middle), (), {}, plan.shapes)
    expected = score(model, [images(8)], without, variant="ddpm_exp", **options)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-9)


def test_reference_quad_counts_every_cell_with_its_width() -> None:
    found = scored("reference-quad", loss_fn=decaying())
    cells = [c for c in quad_cells(1000) if float(falling(torch.tensor(c.timestep))) >= 0.05]
    factor = sum(c.width * float(falling(torch.tensor(c.timestep))) for c in cells)
    np.testing.assert_allclose(found.values, expected_of_sum(factor), rtol=1e-9)
    assert found.samples == len(cells) * 8


def test_reference_quad_is_close_to_the_full_loop_on_a_smooth_loss() -> None:
    full, quad = (scored(e, loss_fn=decaying()).values for e in ("reference", "reference-quad"))
    np.testing.assert_allclose(quad, full, rtol=0.05)


def test_reference_with_taylor_walks_all_timesteps() -> None:
    found = scored("reference", loss_fn=decaying(), criterion="taylor")
    theta, g = weights(tiny()), gradient_at_zero()
    signed = by_hand(tiny_plan(tiny()), {n: theta[n] * g[n] for n in theta})
    np.testing.assert_allclose(found.values, np.abs(signed) * falling_sum(1000), rtol=1e-8)
    assert found.samples == 8000


def test_summary_is_plain_json() -> None:
    import json

    found = scored(max_samples=8, min_samples=8)
    back = json.loads(json.dumps(found.summary()))
    assert back["samples"] == 8
    assert back["curve"]["threshold"] == 0.05
    assert back["estimator"] == "micro"
