"""Adapters and quantised weights are refused with a clear word, before anything is changed or lost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import small_condition_unet
from torch import nn

import diffprune_fast as dpf
from diffprune_fast.checkpoint import CheckpointError
from diffprune_fast.slicing.verify import SliceError


def with_adapters() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = small_condition_unet().eval()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return model


def test_a_model_with_adapters_is_refused_untouched() -> None:
    model = with_adapters()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers have adapters .*fuse_lora"):
        dpf.score_and_prune(model, None, criterion="magnitude", ratio=0.3)
    with pytest.raises(SliceError, match="layers have adapters"):
        dpf.prune(model, dpf.trace(small_condition_unet()), {})
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_wrapped_model_is_refused_too() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(small_condition_unet(), peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        dpf.score_and_prune(wrapped, None, criterion="magnitude", ratio=0.3)


def test_fused_and_taken_off_it_is_pruned() -> None:
    model = with_adapters()
    model.fuse_lora()
    model.unload_lora()
    result = dpf.score_and_prune(model, None, criterion="magnitude", ratio=0.3)
    assert result.after.params < result.before.params


def test_adapters_on_a_pruned_model_are_saved_apart(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = small_condition_unet()
    dpf.score_and_prune(model, None, criterion="magnitude", ratio=0.3)
    plain = copy.deepcopy(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    with pytest.raises(CheckpointError, match="save them apart"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.save_lora_adapter(tmp_path / "lora")
    model.unload_lora()
    model.save_pretrained(tmp_path / "model")
    loaded: Any = dpf.from_pretrained(tmp_path / "model")
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    assert list((tmp_path / "lora").iterdir())


class Packed(nn.Module):
    """Weights as some libraries hold them: bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_quantised_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight is torch.uint8.*then quantise"):
        dpf.score_and_prune(Packed(), None, criterion="magnitude", ratio=0.3, example_inputs=(torch.zeros(1, 4),))


def test_quantised_layers_are_named() -> None:
    kind = type("Linear", (nn.Linear,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.linear"})
    model = nn.Sequential(nn.Linear(4, 8), kind(8, 4))
    with pytest.raises(ValueError, match=r"1 is a torch.ao.nn.quantized.*then quantise"):
        dpf.score_and_prune(model, None, criterion="magnitude", ratio=0.3, example_inputs=(torch.zeros(1, 4),))
