"""What Torch-Pruning kept, found in its history, and compensation of models that it pruned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from pruned_by_tp import CASES
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.integrations.torch_pruning import accelerate, kept_from_history

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def pruned(case: str, steps: int = 1, stays: tuple[str, ...] = ()) -> tuple[nn.Module, nn.Module, Any, Any]:
    """The dense model, the one that a pruner without our kernels left of it, the pruner and the inputs."""
    model, inputs = CASES[case].make()
    dense = copy.deepcopy(model)
    importance = tp.importance.GroupTaylorImportance()
    ignored = [*CASES[case].ignored(model), *(m for n, m in model.named_modules() if stays and n.endswith(stays))]
    pruner = tp.pruner.BasePruner(
        model, inputs, importance, pruning_ratio=0.4, ignored_layers=ignored, iterative_steps=steps
    )
    for _ in range(steps):
        pruner.step()
    return dense, model, pruner, inputs


@pytest.mark.parametrize(
    ("case", "steps"), [("residual", 3), ("grouped", 1), ("normed", 1), ("resnet", 1), ("unet", 1)]
)
def test_kept_is_what_was_kept(case: str, steps: int) -> None:
    dense, model, pruner, inputs = pruned(case, steps)
    kept = kept_from_history(dense, pruner.pruning_history(), inputs)
    assert kept
    for name, p in model.named_parameters():
        expected = dense.get_parameter(name).detach()
        for dim in range(p.dim()):
            if (name, dim) in kept:
                expected = expected.index_select(dim, torch.from_numpy(kept[name, dim]))
        assert torch.equal(p, expected), name


def test_it_is_what_accelerate_noted() -> None:
    model, inputs = CASES["unet"].make()
    dense = copy.deepcopy(model)
    pruner = tp.pruner.BasePruner(
        model, inputs, tp.importance.MagnitudeImportance(), pruning_ratio=0.4, ignored_layers=[model.conv_out]
    )
    with accelerate() as inside:
        pruner.step()
    noted, found = inside.kept(model), kept_from_history(dense, pruner.pruning_history(), inputs)
    assert noted.keys() == found.keys()
    assert all((noted[place] == found[place]).all() for place in noted)


def test_nothing_of_the_models_is_touched() -> None:
    dense, _, pruner, inputs = pruned("residual")
    history = copy.deepcopy(pruner.pruning_history())
    before = {n: p.detach().clone() for n, p in dense.named_parameters()}
    for p in dense.parameters():
        p.requires_grad_(False)
    kept_from_history(dense, pruner.pruning_history(), inputs)
    assert pruner.pruning_history() == history
    assert all(torch.equal(p, before[n]) and not p.requires_grad for n, p in dense.named_parameters())


def test_a_forward_that_looks_at_values() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) if x.sum().item() > 0 else -self.a(x))

    dense = Looking()
    model = copy.deepcopy(dense)
    graph = tp.DependencyGraph().build_dependency(model, torch.ones(1, 4))
    graph.get_pruning_group(model.a, tp.prune_linear_out_channels, [2, 3]).prune()
    kept = kept_from_history(dense, graph.pruning_history(), torch.ones(1, 4))
    assert kept["b.weight", 1].tolist() == [0, 1, 4, 5, 6, 7]


def test_a_history_of_another_model_is_refused() -> None:
    _, _, pruner, _ = pruned("resnet")
    dense, inputs = CASES["normed"].make()
    with pytest.raises(ValueError, match="isn't one of Sequential: give the model as it was"):
        kept_from_history(dense, pruner.pruning_history(), inputs)


def test_compensation_of_a_unet_that_it_pruned() -> None:
    dense, model, pruner, inputs = pruned("unet", stays=("to_q", "to_k", "to_v"))
    for m in model.modules():  # what Torch-Pruning leaves to its user
        if type(m).__name__ in ("Downsample2D", "Upsample2D") and m.conv is not None:
            m.channels = m.conv.in_channels
    kept = kept_from_history(dense, pruner.pruning_history(), inputs)
    generator = torch.Generator().manual_seed(0)
    calls = [
        {
            "sample": torch.randn(16, 3, 16, 16, generator=generator),
            "timestep": torch.randint(0, 1000, (16,), generator=generator),
        }
        for _ in range(6)
    ]
    found = dpf.compensate(model, dense, kept=kept, calibration=calls, progress=False)
    assert found.helped
    assert found.compensated < 0.5 * found.sliced
