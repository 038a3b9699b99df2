"""The proof of a slicing: one real forward of the sliced model beside one of the masked dense model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import small_unet
from oracle import random_keep, randomised
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.slicing import SliceError

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(7))


class Net(nn.Module):
    """a -> ``between`` -> b, 16 channels."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def mixing(h: Tensor) -> Tensor:
    """A real call mixes the channels; a walk is in inference mode and doesn't."""
    return h if torch.is_inference_mode_enabled() else h.softmax(1)


def stepping(h: Tensor) -> Tensor:
    """One more operation in a real call of the whole width."""
    return h.relu() if torch.is_inference_mode_enabled() or h.shape[1] < 16 else h.relu().abs()


def prune(model: nn.Module, **options: object) -> dpf.PruneResult:
    plan = dpf.trace(model, (X,))
    return dpf.prune(model, plan, {"a": np.arange(0, 16, 2)}, example_inputs=(X,), **options)


def test_another_output_in_a_real_call_is_refused_and_the_model_is_whole() -> None:
    model = Net(mixing)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(SliceError, match=r"another output than the model whose removed channels are zero"):
        prune(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert {id(p) for p in model.parameters()} == {
        id(p) for m in model.modules() for p in m._parameters.values() if p is not None
    }


def test_another_operation_in_a_real_call_is_refused() -> None:
    with pytest.raises(SliceError, match="computes something else: abs"):
        prune(Net(stepping))


def test_a_word_leaves_the_proof_out() -> None:
    model = Net(mixing)
    assert prune(model, proof=False).proof is None
    assert model.a.out_channels == 8


def test_a_slicing_that_is_right_is_proven() -> None:
    result = prune(Net(F.silu))
    assert result.proof.calls == 3
    assert result.proof.error < 1e-5
    assert "proof: 3 operations alike" in str(result)


@pytest.mark.parametrize("norm_groups", ["exact", "count"])
def test_norms_and_heads_are_compared(norm_groups: str) -> None:
    model = randomised(small_unet(attention_head_dim=8)).float()
    plan = dpf.trace(model)
    result = dpf.prune(model, plan, random_keep(plan, 0.4, 0, norm_groups), norm_groups=norm_groups)
    assert result.proof.error is not None
    assert result.proof.error < 1e-4


def test_half_precision_is_computed_in_single() -> None:
    model = Net(F.silu).bfloat16()
    plan = dpf.trace(model, (X.bfloat16(),))
    result = dpf.prune(model, plan, {"a": np.arange(8)}, example_inputs=(X.bfloat16(),))
    assert result.proof.error < 1e-5
    assert model.a.weight.dtype == torch.bfloat16


def test_large_parameters_are_made_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffprune_fast.slicing.real_calls._LARGE", 10)
    assert prune(Net(lambda h: F.silu(h).to(h.device))).proof.error < 1e-5


def test_noise_of_a_width_that_changes_is_not_compared() -> None:
    result = prune(Net(lambda h: h + torch.randn_like(h)))
    assert result.proof.error is None
    assert "draws noise" in result.proof.note


def test_inputs_that_do_not_fit_are_named_and_refuse_nothing() -> None:
    def picky(h: Tensor) -> Tensor:
        if not torch.is_inference_mode_enabled():
            raise ZeroDivisionError("no such number")
        return h

    assert "would not run on these inputs: no such number" in str(prune(Net(picky)).proof)


def test_the_method_proves_once_and_says_so() -> None:
    model = small_unet()
    loader = [torch.rand(4, 3, 16, 16) * 2 - 1]
    result = dpf.score_and_prune(model, loader, ratio=0.25, max_samples=4, progress=False, compensate=False)
    assert result.proof.error < 1e-3
