"""Gauss-Newton unit scores against autograd and against the output's real Jacobians."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_ranks
from scoring_models import by_hand, gradients, images, tiny, tiny_plan, weights
from torch import Tensor, nn

from diffprune_fast.objective import make_objective
from diffprune_fast.objective.batches import Batches
from diffprune_fast.objective.isolation import stand_ins
from diffprune_fast.objective.randomness import NOISE, TIMESTEPS, generator_for, stratified
from diffprune_fast.plan import Member
from diffprune_fast.scoring import score
from diffprune_fast.scoring.estimators import Work
from diffprune_fast.scoring.gauss_newton import PROBES, Damage, consumer_members
from diffprune_fast.scoring.tables import unit_table
from diffprune_fast.tracing import trace

SEED = 3
ALLOWED = [0, 3, 50, 51, 52, 400]
CONSUMERS = {"conv1.weight:1", "conv_out.weight:1", "conv2.weight:1"}


def reads(member: Member) -> bool:
    return member.place in CONSUMERS


def scored(estimator: str = "micro", **options: Any) -> Any:
    model = options.pop("model", None) or tiny()
    given = {"micro_batch": 4, "min_samples": 12, "max_samples": 12, "progress": False, "seed": SEED, **options}
    loader = given.pop("loader", [images(8)])
    return score(model, loader, tiny_plan(model), estimator=estimator, **given)


def noisy_batches(n: int, skipped: int = 0) -> list[tuple[Tensor, Tensor]]:
    """What the seed makes of 8 images after ``skipped`` micro-batches: noisy images and timesteps of every one."""
    data, objective = torch.cat([images(8)] * (n + skipped))[4 * skipped :], make_objective(tiny())
    found = []
    for k in range(n):
        x = data[4 * k : 4 * k + 4]
        t = stratified(np.array(ALLOWED), 4, generator_for(SEED, TIMESTEPS, k))
        found.append((objective.noisy(x, t, objective.noise(x, generator_for(SEED, NOISE, k))), t))
    return found


def expected_damage(model: nn.Module, n: int, skipped: int = 0) -> np.ndarray:
    total = np.zeros(tiny_plan(model).n_units)
    for k, (x, t) in enumerate(noisy_batches(n, skipped)):
        y = model(x, t)
        z = torch.randn(y.shape, generator=generator_for(SEED, PROBES, k)).double() / math.sqrt(y[0].numel())
        g, theta = gradients(model, (y * z).sum()), weights(model)
        total += by_hand(tiny_plan(model), {name: theta[name] * g[name] for name in theta}, reads) ** 2
    return total / (4 * n)


# ----------------------------------------------------------------------------------------------------------------------
# The formula


@pytest.mark.parametrize("estimator", ["micro", "mean"])
@pytest.mark.parametrize("criterion", ["diff-pruning", "taylor", "fisher"])
def test_damage_is_the_squared_sum_over_consumers_per_sample(estimator: str, criterion: str) -> None:
    found = scored(estimator, criterion=criterion, timesteps=ALLOWED)
    np.testing.assert_allclose(found.damage, expected_damage(tiny(), 3, skipped=3), rtol=1e-9)


def test_estimates_the_squared_change_that_the_jacobian_says() -> None:
    model, plan = tiny(), tiny_plan(tiny())
    x, t = noisy_batches(1)[0]
    flat = model(x, t)
    exact = np.zeros(plan.n_units)
    for sample in flat:
        for element in sample.flatten():
            g = gradients_kept(model, element)
            theta = weights(model)
            exact += by_hand(plan, {n: theta[n] * g[n] for n in theta}, reads) ** 2 / sample.numel()
    draws = 600
    with stand_ins(model, unit_table(plan).parameters) as parameters:
        work = make_work(model, parameters)
        collector = Damage(work)
        for k in range(draws):
            collector.add(k, lambda: model(x, t).square().mean())
        found = collector.mean(draws * len(x))
    assert found is not None
    # A draw's square scatters by sqrt(2) of its mean; four times that over 600 draws.
    np.testing.assert_allclose(found, exact / len(x), rtol=4 * math.sqrt(2 / draws))


def gradients_kept(model: nn.Module, y: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(y, parameters, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found)}


def make_work(model: nn.Module, parameters: Any, loss_fn: Any = None) -> Work:
    objective = make_objective(model, loss_fn=loss_fn)
    batches = Batches([images(8)], lambda batch: None)
    return Work(
        model=model,
        plan=tiny_plan(model),
        objective=objective,
        batches=batches,
        parameters=parameters,
        device=torch.device("cpu"),
        seed=SEED,
        progress=False,
    )


def test_a_layer_that_reads_last_has_the_damage_of_its_removal() -> None:
    """The output is linear in conv_out, so that the expansion is exact there: no draws are needed to say it."""
    model = tiny()
    x, t = noisy_batches(1)[0]
    plan = tiny_plan(model)
    with torch.no_grad():
        whole = model(x, t)
        exact = []
        for channels in plan.groups[0].members[-1].index:
            without = tiny()
            without.conv_out.weight[:, channels] = 0
            exact.append(float((without(x, t) - whole).square().mean()))
    only_last = {"stream": [plan.groups[0].members[-1]]}
    draws, total = 600, np.zeros(plan.n_units)
    table = unit_table(plan, members=only_last)
    with stand_ins(model, unit_table(plan).parameters) as parameters:
        collector = Damage(make_work(model, parameters))
        collector._table, collector._parameters = table, {n: parameters[n] for n in table.parameters}
        for k in range(draws):
            collector.add(k, lambda: model(x, t).square().mean())
        total = collector.mean(draws * len(x))  # type: ignore[assignment]
    np.testing.assert_allclose(total[: len(exact)], exact, rtol=4 * math.sqrt(2 / draws))


@pytest.mark.parametrize("estimator", ["micro", "mean"])
def test_the_criterion_scores_as_it_does_alone(estimator: str) -> None:
    alone, beside = scored(estimator, damage=False), scored(estimator)
    np.testing.assert_allclose(beside.values, alone.values, rtol=1e-12)
    assert alone.damage is None
    assert (alone.samples, alone.agreement) == (beside.samples, beside.agreement)


def test_a_gradient_that_is_not_finite_names_its_group() -> None:
    class Twice(type(tiny())):  # type: ignore[misc]
        def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(sample, timestep)
            return y, (y - y.detach()).abs().sqrt()  # 0, with an infinite slope

    model = Twice().double()
    with pytest.raises(FloatingPointError, match="output is NaN or infinite in the group stream"):
        score(model, [images(8)], tiny_plan(model), max_samples=4, micro_batch=4, progress=False)


# ----------------------------------------------------------------------------------------------------------------------
# What is counted


class Readers(nn.Module):
    """Every kind of layer that a channel may pass on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.up = nn.ConvTranspose1d(8, 8, 2, stride=2)
        self.norm = nn.GroupNorm(2, 8)
        self.alone = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.halves = nn.Conv1d(8, 12, 1, groups=2)
        self.last = nn.Conv1d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.table(x).transpose(1, 2))
        return self.last(self.halves(self.alone(self.norm(h))))


def test_only_layers_that_mix_channels_read_them() -> None:
    model = Readers()
    plan = trace(model, (torch.zeros(1, 4, dtype=torch.long),))
    found = {p for g in consumer_members(plan, model).values() for p in (m.place for m in g)}
    assert found == {"up.weight:0", "halves.weight:1", "last.weight:1"}


class Attends(nn.Module):
    def __init__(self, fused: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.to_qkv = nn.Linear(6, 24, bias)
        else:
            self.to_q, self.to_k, self.to_v = (nn.Linear(6, 8, bias) for _ in range(3))
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.to_qkv(x).chunk(3, -1) if self.fused else (self.to_q(x), self.to_k(x), self.to_v(x))
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in parts)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def signed(plan: Any, members: Any, model: nn.Module, x: Tensor) -> np.ndarray:
    y = model(x)
    z = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    g, theta = gradients(model, (y * z).sum()), weights(model)
    of = {id(m) for g_ in members.values() for m in g_}
    groups = tuple(type(gr)(gr.name, gr.n_units, tuple(members[gr.name])) for gr in plan.groups)
    counted = type(plan)(plan.model_class, groups, (), {}, plan.shapes)
    assert of
    return by_hand(counted, {n: theta[n] * g[n] for n in theta})


@pytest.mark.parametrize("bias", [True, False])
def test_queries_and_keys_are_scored_by_one_side(bias: bool) -> None:
    torch.manual_seed(0)
    model = Attends(bias=bias).double()
    x = torch.randn(2, 5, 6).double()
    plan = trace(model, (x,))
    members = consumer_members(plan, model)
    (name,) = [n for n, ms in members.items() if any(m.parameter.startswith(("to_q", "to_k")) for m in ms)]
    side = {m.parameter.split(".")[0] for m in members[name]}
    assert side in ({"to_q"}, {"to_k"})
    assert len(members[name]) == 1 + bias
    other = {"to_q": "to_k", "to_k": "to_q"}[side.pop()]
    swapped = {**members, name: [m for m in plan[name].members if m.parameter.startswith(other)]}
    np.testing.assert_allclose(signed(plan, members, model, x), signed(plan, swapped, model, x), rtol=1e-9, atol=1e-12)


def test_a_fused_projection_counts_as_separate_ones() -> None:
    torch.manual_seed(0)
    apart, fused = Attends().double(), Attends(fused=True).double()
    with torch.no_grad():
        fused.out.load_state_dict(apart.out.state_dict())
        for leaf in ("weight", "bias"):
            both = torch.cat([getattr(getattr(apart, n), leaf) for n in ("to_q", "to_k", "to_v")])
            getattr(fused.to_qkv, leaf).copy_(both)
    x = torch.randn(2, 5, 6).double()
    sums = []
    for model in (apart, fused):
        plan = trace(model, (x,))
        sums.append(np.sort(signed(plan, consumer_members(plan, model), model, x)))
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Where the output comes from


def test_criteria_without_gradients_have_it_where_there_is_a_loader() -> None:
    for criterion in ("magnitude", "random"):
        found = scored(criterion=criterion, timesteps=ALLOWED)
        np.testing.assert_allclose(found.damage, expected_damage(tiny(), 3), rtol=1e-9)
        alone = score(tiny(), None, tiny_plan(tiny()), criterion=criterion, seed=SEED)
        assert alone.damage is None
        np.testing.assert_array_equal(found.values, alone.values)


def test_the_reference_loop_has_it_by_passes_of_its_own() -> None:
    found = scored("reference", timesteps=[0, 1])
    assert found.damage is not None
    assert (found.damage > 0).all()
    assert found.samples == 2 * 8


def test_a_loss_of_ones_own_is_seen_through() -> None:
    objective = make_objective(tiny())

    def loss_fn(model: nn.Module, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        y = model(objective.noisy(batch, t, noise), t)
        with torch.no_grad():
            model(batch, t)  # a call without gradients is not the output
        return y.sub_(1.0).square().flatten(1).mean(1)

    found = scored(loss_fn=loss_fn, timesteps=ALLOWED)
    np.testing.assert_allclose(found.damage, expected_damage(tiny(), 3, skipped=3), rtol=1e-9)


def test_where_only_parts_are_called_the_last_one_is_the_output() -> None:
    def loss_fn(model: Any, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        return model.conv2(model.norm(model.conv1(model.conv_in(batch)))).square().mean()

    found = scored(loss_fn=loss_fn, timesteps=ALLOWED)
    stream, middle = found.damage[:6], found.damage[6:]
    assert (stream > 0).all()
    assert (middle > 0).all()


def test_without_any_call_there_is_none() -> None:
    def loss_fn(model: Any, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        return nn.functional.conv2d(batch, model.conv_in.weight).square().mean()

    assert scored(loss_fn=loss_fn, timesteps=ALLOWED).damage is None


# ----------------------------------------------------------------------------------------------------------------------
# Several ranks


def on_rank(rank: int, ranks: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    found = [
        scored(timesteps=ALLOWED),
        scored("mean", timesteps=ALLOWED),
        scored(criterion="random", timesteps=ALLOWED),
    ]
    np.save(f"{path}.{rank}.npy", np.stack([f.damage for f in found]))
    torch.distributed.destroy_process_group()


def test_ranks_end_with_the_damage_of_one_process(tmp_path: Any) -> None:
    run_ranks(on_rank, 2, str(tmp_path / "store"))
    alone = [expected_damage(tiny(), 3, skipped=skipped) for skipped in (3, 3, 0)]
    for rank in range(2):
        np.testing.assert_allclose(np.load(f"{tmp_path / 'store'}.{rank}.npy"), alone, rtol=1e-9)
