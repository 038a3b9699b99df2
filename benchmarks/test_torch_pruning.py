"""``step()`` of Torch-Pruning's pruners, without and with the one line ``with accelerate()``.

Both prune the same model in one process, turn and turn about, so that a load on the machine meets both; what is quoted
is the ratio of the medians. That both left the same channels is checked.
``--benchmark-timer time.process_time`` compares CPU time, where a machine is shared.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import measured
import pytest
import torch
import torch_pruning as tp
import unet_configs
from torch import nn

from diffprune_fast.integrations.torch_pruning import accelerate

ROUNDS = {"resnet50": 3, "vit": 3, "cifar": 5, "sd15": 1}


def resnet50() -> tuple[nn.Module, Any, list[nn.Module], dict[str, Any]]:
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    return model, torch.zeros(1, 3, 64, 64), [model.classifier[1]], {}


def vit() -> tuple[nn.Module, Any, list[nn.Module], dict[str, Any]]:
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(num_labels=1000, image_size=64))
    heads = {m: 12 for n, m in model.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj"))}
    return model, torch.zeros(1, 3, 64, 64), [model.classifier], {"num_heads": heads}


def unet(name: str) -> Callable[[], tuple[nn.Module, Any, list[nn.Module], dict[str, Any]]]:
    def build() -> tuple[nn.Module, Any, list[nn.Module], dict[str, Any]]:
        model: Any = unet_configs.build(name)
        return model, unet_configs.example_inputs(name), [model.conv_out], {}

    return build


MODELS = {"resnet50": resnet50, "vit": vit, "cifar": unet("cifar"), "sd15": unet("sd15")}


def pruner_of(name: str) -> Any:
    torch.manual_seed(0)
    model, inputs, ignored, options = MODELS[name]()
    for p in model.eval().parameters():
        p.grad = torch.randn_like(p)
    importance = tp.importance.GroupTaylorImportance()
    return tp.pruner.BasePruner(model, inputs, importance, pruning_ratio=0.3, ignored_layers=ignored, **options)


def step(name: str, inside: bool) -> tuple[float, dict[str, tuple[int, ...]], Any]:
    """Seconds of one step, the shapes that it left and the pruning history."""
    pruner = pruner_of(name)
    gc.collect()
    begin = measured.clock()
    with accelerate() if inside else nullcontext():
        pruner.step()
    seconds = measured.clock() - begin
    shapes = {n: tuple(p.shape) for n, p in pruner.model.named_parameters()}
    return seconds, shapes, copy.deepcopy(pruner.pruning_history())


@pytest.mark.parametrize("name", MODELS)
def test_step(benchmark: Any, name: str) -> None:
    seconds: dict[bool, list[float]] = {False: [], True: []}

    def both() -> None:
        found = {}
        for inside in (True, False) if len(seconds[True]) % 2 else (False, True):
            took, *found[inside] = step(name, inside)
            seconds[inside].append(took)
        assert found[True] == found[False]

    benchmark.pedantic(both, rounds=ROUNDS[name], iterations=1)
    median = {inside: statistics.median(values) for inside, values in seconds.items()}
    ratio = median[False] / median[True]
    benchmark.extra_info.update(outside=median[False], inside=median[True], ratio=ratio)
    print(f"\n{name}: {median[False]:.3f} s outside, {median[True]:.3f} s inside, {ratio:.1f}x")
