"""Which small models Torch-Pruning's pruner leaves running, and which PlanPruner does.

    python benchmarks/torch_pruning_reach.py

Both get the model, its inputs, a magnitude importance and 0.3; Torch-Pruning also the layers that make the output.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from diffprune_fast.architectures.inputs import calls_of
from diffprune_fast.integrations.torch_pruning import PlanPruner

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "integrations")]

OF_ZOO = (
    "UNet2DConditionModel-K",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel-3",
    "FluxTransformer2DModel",
    "CogVideoXTransformer3DModel",
)
OUTPUTS = ("proj_out", "proj_out_1", "proj_out_2", "conv_out", "classifier")


def models() -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    from pruned_by_tp import vit
    from test_plan_pruner import swin
    from zoo import ZOO

    for case in ZOO:
        if case.name in OF_ZOO:
            model = case.make().float()
            inputs = case.example_inputs if case.example_inputs is not None else calls_of(model, None)[0][2]
            yield case.name, model, real(inputs)
    for name, make, size in (("ViT", vit, 16), ("Swin", swin, 32)):
        yield name, make(), {"pixel_values": torch.randn(1, 3, size, size)}


def real(tree: Any) -> Any:
    """Inputs with values, in float32."""
    if isinstance(tree, Tensor):
        t = torch.zeros(tree.shape, dtype=tree.dtype) if tree.device.type == "meta" else tree
        return t.float() if t.is_floating_point() else t
    if isinstance(tree, dict):
        return {k: real(v) for k, v in tree.items()}
    return type(tree)(real(v) for v in tree) if isinstance(tree, (tuple, list)) else tree


def torch_prunings(model: nn.Module, inputs: dict[str, Any]) -> None:
    ignored = [m for n, m in model.named_modules() if n.rpartition(".")[2] in OUTPUTS]
    importance = tp.importance.MagnitudeImportance()
    tp.pruner.BasePruner(model, inputs, importance, pruning_ratio=0.3, ignored_layers=ignored).step()


def ours(model: nn.Module, inputs: dict[str, Any]) -> None:
    PlanPruner(model, inputs, tp.importance.MagnitudeImportance(), ratio=0.3).step()


def outcome(prune: Callable[[nn.Module, dict[str, Any]], None], model: nn.Module, inputs: dict[str, Any]) -> str:
    before = sum(p.numel() for p in model.parameters())
    stage = "raises"
    try:
        prune(model, inputs)
        stage = "the pruned model doesn't run:"
        model(**inputs)
    except Exception as error:
        return f"{stage} {type(error).__name__} {str(error).splitlines()[0][:80]}"
    return f"runs, {sum(p.numel() for p in model.parameters()) / before:.2f} of the parameters"


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    for name, model, inputs in models():
        twin = copy.deepcopy(model)
        print(f"{name:30} torch_pruning: {outcome(torch_prunings, twin, inputs)}")
        print(f"{'':30} PlanPruner:    {outcome(ours, model, inputs)}")


if __name__ == "__main__":
    main()
