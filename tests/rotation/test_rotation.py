"""Heads are rotated without the model noticing; then their last dims are the ones it needs least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import Case, small_condition_unet, small_unet
from processes import run_ranks
from torch import Tensor, nn
from zoo import ZOO

from diffprune_fast import prune
from diffprune_fast.plan import Plan
from diffprune_fast.rotation import find_heads, rotate_heads
from diffprune_fast.tracing import trace

CASES = {case.name: case for case in ZOO}
IMAGES = [torch.zeros(2, 3, 8, 8)]


def _made(case: Case) -> tuple[nn.Module, Plan]:
    """A case's model in double precision, with no weight at the zero that it may begin with; and its plan."""
    torch.manual_seed(0)
    model = case.make().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model, trace(model, case.example_inputs)  # type: ignore[arg-type]


def _loss(case: Case) -> Callable[..., Tensor]:
    """A ``loss_fn`` that runs a case with its own inputs, whatever the batch."""
    return lambda model, *_: case.run(model).square().mean()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def _change(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


class Attention(nn.Module):
    """One attention over the pixels of an image; ``between`` is what queries and keys go through on their way."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x, scale: float | None = None) -> None:
        super().__init__()
        self.between, self.scale = between, scale
        self.proj_in = nn.Linear(3, 24)
        self.qkv = nn.ModuleList(nn.Linear(24, 32) for _ in range(3))
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = torch.tanh(4 * self.proj_in(x.flatten(2).transpose(1, 2)))
        q, k, v = (p(tokens).unflatten(-1, (4, -1)).transpose(1, 2) for p in self.qkv)
        h = F.scaled_dot_product_attention(self.between(q), self.between(k), v, scale=self.scale)
        return self.out(h.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(-1, x.shape[2:])


def _attention(*args: Any) -> tuple[Attention, Plan, list[Tensor]]:
    torch.manual_seed(0)
    model = Attention(*args).double().eval()
    loader = [torch.randn(8, 3, 4, 4, dtype=torch.float64).clamp(-1, 1)]
    return model, trace(model, (torch.empty(1, 3, 4, 4), torch.tensor([3]))), loader


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("UNet2DModel-Attn", 14),
        ("UNet2DConditionModel-classes", 16),
        ("UNet2DConditionModel-SimpleCrossAttn", 6),
        ("DiTTransformer2DModel", 4),
        ("PixArtTransformer2DModel", 8),
        ("SD3Transformer2DModel-3", 6),
        ("LanguageModel-fused-chunk", 4),
    ],
)
def test_the_rotated_model_answers_the_same(name, sides):
    case = CASES[name]
    model, plan = _made(case)
    with torch.no_grad():
        before, weights = case.run(model), _weights(model)
        rotation = rotate_heads(model, plan, IMAGES, loss_fn=_loss(case), samples=2)
        after = case.run(model)
    assert (len(rotation.rotated), rotation.standing) == (sides, {})
    turned = [p.parameter for pair in find_heads(model, plan)[0] for p in (*pair.left, *pair.right)]
    assert not any(torch.equal(weights[n], model.get_parameter(n)) for n in turned)
    assert _change(after, before) < 1e-9


def test_queries_and_keys_under_a_norm_stay_as_they_are():
    case = CASES["SD3Transformer2DModel-3.5"]
    model, plan = _made(case)
    with torch.no_grad():
        before, weights = case.run(model), _weights(model)
        rotation = rotate_heads(model, plan, IMAGES, loss_fn=_loss(case), samples=2)
        after = case.run(model)
    assert all(name.endswith("vo") for name in rotation.rotated)
    assert rotation.standing["transformer_blocks.0.attn qk"].endswith("norm_q.weight:0 stands in between")
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if "to_q" in n or "to_k" in n)
    assert _change(after, before) < 1e-9


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "LanguageModel-gqa-sdpa"])
def test_a_model_without_single_dims_to_remove_is_left_alone(name):
    case = CASES[name]
    model, plan = _made(case)
    weights = _weights(model)
    rotation = rotate_heads(model, plan, None, loss_fn=_loss(case))
    assert (rotation.rotated, rotation.change) == ((), None)
    assert _same(weights, _weights(model))


def test_half_of_the_dims_after_rotation_cost_less_than_any_half_that_was_tried_before():
    model, plan, loader = _attention()
    x, t = loader[0], torch.tensor([3])
    with torch.no_grad():
        dense = model(x, t)
        others = [_change(_pruned(model, plan, _keep(plan, 4, seed))(x, t), dense) for seed in range(20)]
        rotate_heads(model, plan, loader, samples=8, loss_fn=lambda m, b, t, n: m(b, t).square().mean((1, 2, 3)))
        rotated = _change(_pruned(model, plan, _keep(plan, 4))(x, t), dense)
    assert rotated < 0.5 * min(others)


def _keep(plan: Plan, n: int, seed: int | None = None) -> dict[str, np.ndarray]:
    """``n`` dims of every head: the first ones, or random ones."""
    keep: dict[str, list[np.ndarray]] = {}
    random = np.random.default_rng(seed)
    for constraint in (c for c in plan.constraints if c.kind == "heads"):
        for row in constraint.rows:
            g = int(np.searchsorted(plan.offsets, row[0], side="right")) - 1
            chosen = row[:n] if seed is None else random.choice(row, n, replace=False)
            keep.setdefault(plan.groups[g].name, []).append(chosen - plan.offsets[g])
    return {name: np.sort(np.concatenate(units)) for name, units in keep.items()}


def _pruned(model: nn.Module, plan: Plan, keep: dict[str, np.ndarray], **options: Any) -> nn.Module:
    inputs = (torch.empty(1, 3, 4, 4), torch.tensor([3])) if isinstance(model, Attention) else None
    return prune(model, plan, keep, inplace=False, example_inputs=inputs, **options).model


def _plant(model: nn.Module, plan: Plan, rank: int, keys: bool = False) -> None:
    """Make queries (or keys) and values of every head lie in ``rank`` directions, none of them an axis."""
    parameters = dict(model.named_parameters())
    for pair in find_heads(model, plan)[0]:
        n, d = pair.shape
        basis = torch.linalg.qr(torch.randn(n, d, rank, dtype=torch.float64))[0]
        projection = basis @ basis.mT
        for place in pair.right if keys and pair.kind == "qk" else pair.left:
            rows = torch.from_numpy(place.channels)
            with torch.no_grad():
                heads = parameters[place.parameter][rows].reshape(n, d, -1)
                parameters[place.parameter][rows] = (projection @ heads).reshape(
                    parameters[place.parameter][rows].shape
                )


@pytest.mark.parametrize("make", [small_unet, small_condition_unet])
def test_planted_directions_become_the_first_dims(make):
    torch.manual_seed(0)
    model = make(sample_size=8, attention_head_dim=8 if make is small_unet else 4).double().eval()
    plan = trace(model)
    _plant(model, plan, 3)
    images = torch.randn(4, model.config.in_channels, 8, 8, dtype=torch.float64).clamp(-1, 1)
    batch: dict[str, Tensor] = {"sample": images}
    if make is small_condition_unet:
        batch["encoder_hidden_states"] = torch.randn(4, 7, 24, dtype=torch.float64)
    forward = {**batch, "timestep": torch.tensor([3, 100, 400, 900])}
    keep = _keep(plan, 3)
    with torch.no_grad():
        dense = model(**forward).sample
        unrotated = _change(_pruned(model, plan, keep)(**forward).sample, dense)
        rotate_heads(model, plan, [batch], samples=4)
        rotated = _change(_pruned(model, plan, keep)(**forward).sample, dense)
    assert unrotated > 1e-4
    assert rotated < 1e-6


def test_no_dim_is_spent_on_what_all_keys_have_in_common():
    model, plan, loader = _attention()
    _plant(model, plan, 3, keys=True)
    model.qkv[1].bias.data += torch.randn(32, dtype=torch.float64)
    x, t = loader[0], torch.tensor([3])
    with torch.no_grad():
        dense = model(x, t)
        rotate_heads(model, plan, loader, samples=8)
        rotated = _change(_pruned(model, plan, _keep(plan, 3))(x, t), dense)
    assert rotated < 1e-6


def test_a_basis_that_the_model_would_notice_is_put_back_and_the_rest_stays_rotated():
    model, plan, loader = _attention(lambda x: F.layer_norm(x, x.shape[-1:]), 0.5)
    weights = _weights(model)
    with torch.no_grad():
        before = model(loader[0], torch.tensor([3]))
        rotation = rotate_heads(model, plan, loader, samples=8)
        after = model(loader[0], torch.tensor([3]))
    assert rotation.rotated == ("model vo",)
    assert rotation.standing["model qk"].startswith("rotated, it would change the outputs by")
    assert _change(after, before) < 1e-9
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n.startswith(("qkv.0", "qkv.1")))


def test_an_attention_that_is_called_twice_keeps_its_function():
    model, plan, loader = _attention()
    twice = _Twice(model).double().eval()
    plan = trace(twice, (torch.empty(1, 3, 4, 4), torch.tensor([3])))
    with torch.no_grad():
        before = twice(loader[0], torch.tensor([3]))
        rotation = rotate_heads(twice, plan, loader, samples=8)
        after = twice(loader[0], torch.tensor([3]))
    assert rotation.rotated == ("attention qk", "attention vo")
    assert _change(after, before) < 1e-9


class _Twice(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.attention(torch.tanh(self.attention(x, t)), t)


def _rank_main(rank: int, ranks: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    try:
        model, plan, loader = _attention()
        rotate_heads(model, plan, loader, samples=8, micro_batch=2)
        torch.save(_weights(model), f"{path}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_share_the_samples_and_end_with_one_process_weights(tmp_path):
    run_ranks(_rank_main, 2, str(tmp_path / "store"))
    model, plan, loader = _attention()
    rotate_heads(model, plan, loader, samples=8, micro_batch=2)
    first, second = (torch.load(tmp_path / f"store-{rank}.pt", weights_only=True) for rank in range(2))
    for name, weight in _weights(model).items():
        torch.testing.assert_close(first[name], second[name], rtol=1e-12, atol=1e-12)
        # directions that carry next to nothing depend on the order of sums
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-3)


def test_a_softmax_scale_that_is_told_is_no_obstacle():
    model, plan, loader = _attention(lambda x: x, 0.5)
    assert rotate_heads(model, plan, loader, samples=8).rotated == ("model qk", "model vo")


def test_parameters_stay_the_same_objects_with_their_gradients_and_flags():
    model, plan, loader = _attention()
    model.train()
    model.out.weight.requires_grad_(False)
    model.out.bias.grad = gradient = torch.ones_like(model.out.bias)
    objects = dict(model.named_parameters())
    rotate_heads(model, plan, loader, samples=8)
    assert all(p is objects[n] for n, p in model.named_parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["out.weight"]
    assert model.out.bias.grad is gradient
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_undo_puts_every_bit_back():
    model, plan, loader = _attention()
    weights = _weights(model)
    rotation = rotate_heads(model, plan, loader, samples=8)
    assert not _same(weights, _weights(model))
    rotation.undo()
    assert _same(weights, _weights(model))


def test_undo_after_forgetting_leaves_the_model_rotated():
    model, plan, loader = _attention()
    rotation = rotate_heads(model, plan, loader, samples=8)
    weights = _weights(model)
    rotation.forget()
    rotation.undo()
    assert _same(weights, _weights(model))


def test_undo_of_a_pruned_model_is_refused():
    model, plan, loader = _attention()
    rotation = rotate_heads(model, plan, loader, samples=8)
    prune(model, plan, _keep(plan, 4), example_inputs=(torch.empty(1, 3, 4, 4), torch.tensor([3])))
    with pytest.raises(ValueError, match="was pruned since its heads were rotated"):
        rotation.undo()


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_any_forward_leaves_every_bit_as_it_was(call, error):
    model, plan, loader = _attention()
    weights, calls = _weights(model), []

    def loss(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == call:
            raise error("injected")
        return model(batch, t).square().mean()

    with pytest.raises(error, match="injected"):
        rotate_heads(model, plan, loader, loss_fn=loss, samples=8)
    assert len(calls) == call
    assert _same(weights, _weights(model))


def test_half_precision_is_rotated_within_its_rounding_or_not_at_all():
    torch.manual_seed(0)
    model = small_unet().bfloat16().eval()
    weights = _weights(model)
    rotation = rotate_heads(model, trace(model), [torch.randn(4, 3, 16, 16).clamp(-1, 1)], samples=4)
    assert rotation.change <= 2**-6 if rotation.rotated else _same(weights, _weights(model))


def test_the_same_seed_gives_the_same_basis():
    found = []
    for _ in range(2):
        model, plan, loader = _attention()
        rotate_heads(model, plan, loader, samples=8, seed=3)
        found.append(_weights(model))
    assert all(torch.allclose(found[0][n], found[1][n], rtol=1e-9) for n in found[0])


def test_images_with_nan_are_refused():
    model, plan, loader = _attention()
    loader[0][3, 0, 1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in the loader's images"):
        rotate_heads(model, plan, loader, samples=8)


def test_activations_that_overflow_are_an_error_that_names_the_attention():
    case = CASES["DiTTransformer2DModel"]
    model, plan = _made(case)
    with torch.no_grad():
        model.get_submodule("transformer_blocks.1.attn1.to_k").weight.mul_(1e200)
    weights = _weights(model)
    with pytest.raises(FloatingPointError, match=r"activations in transformer_blocks\.1\.attn1"):
        rotate_heads(model, plan, IMAGES, loss_fn=_loss(case), samples=2)
    assert _same(weights, _weights(model))


def test_without_a_loader_there_is_nothing_to_go_by():
    model, plan, _ = _attention()
    with pytest.raises(ValueError, match="give a loader"):
        rotate_heads(model, plan, None)
