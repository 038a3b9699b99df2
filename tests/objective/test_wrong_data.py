"""Wrong data: named with its cause, and the next step, by whatever the data is given to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from PIL import Image
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.evaluation.loss import diffusion_loss
from diffprune_fast.objective.batches import as_loader
from diffprune_fast.objective.checks import check_batch, check_weights
from diffprune_fast.objective.conditioning import _say_unused
from diffprune_fast.objective.forms import as_batch
from diffprune_fast.objective.isolation import unwrapped
from diffprune_fast.recovery.finetune import finetune

SMALL = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
}


def unet(**changes: Any) -> Any:
    torch.manual_seed(0)
    return UNet2DModel(**{**SMALL, **changes})


def text_unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )


def images(n: int = 4, channels: int = 3, size: int = 8) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def text(width: int = 8, **changes: Any) -> dict[str, Any]:
    return {"images": images(channels=4), "encoder_hidden_states": torch.ones(4, 3, width), **changes}


TWO = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
NAN = torch.full((4, 3, 8), torch.nan)

# model, batch, what is said of it
WRONG: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "0 to 255": (unet, (images() + 1) * 127.5, r"go from .* to .*x / 127\.5 - 1"),
    "signed bytes": (unet, images() * 128, r"go from -1.* to .*x / 127\.5 - 1"),
    "bytes": (unet, images().to(torch.uint8), r"uint8 images.*127\.5"),
    "channels last": (unet, images().movedim(1, -1), r"channels are last.*movedim\(-1, 1\)"),
    "a size that it can't halve": (
        lambda: unet(block_out_channels=(8, 8), down_block_types=TWO[0], up_block_types=TWO[1]),
        images(size=7),
        "can't take images of 7x7 .*give multiples of 2",
    ),
    "NaN": (unet, images() * torch.nan, "NaN or infinity in the loader's images"),
    "a misspelt name": (
        text_unet,
        {"images": images(channels=4), "encoder_hidden_state": torch.ones(4, 3, 8)},
        "have 'encoder_hidden_state'.*did you mean 'encoder_hidden_states'",
    ),
    "text of another width": (text_unet, text(16), "takes encoder_hidden_states of width 8, the loader's have 16"),
    "NaN in the text": (text_unet, text(encoder_hidden_states=NAN), "encoder_hidden_states"),
    "labels out of range": (
        lambda: unet(num_class_embeds=3),
        (images(), torch.tensor([0, 1, 2, 3])),
        "go from 0 to 3, UNet2DModel has 3 classes, 0 to 2",
    ),
    "labels that are no integers": (
        lambda: unet(num_class_embeds=3),
        {"images": images(), "class_labels": torch.ones(4)},
        "takes integers below 3",
    ),
}  # fmt: skip


def scored(model: nn.Module, batch: Any) -> Any:
    return dpf.score_and_prune(model, [batch], ratio=0.3, criterion="taylor", max_samples=4, progress=False)


def trained(model: nn.Module, batch: Any) -> Any:
    return finetune(model, [batch], steps=1, progress=False)


DOORS = {"score": scored, "finetune": trained, "evaluate": diffusion_loss}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("door", DOORS)
def test_wrong_data_is_named_wherever_it_is_given(door: str, what: str) -> None:
    make, batch, words = WRONG[what]
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        DOORS[door](model, batch)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_compensation_has_the_same_door() -> None:
    kept = {("conv_in.weight", 0): np.arange(8)}
    with pytest.raises(ValueError, match=r"x / 127\.5 - 1"):
        dpf.compensate(unet(), unet(), [(images() + 1) * 127.5], kept=kept, progress=False)


def test_nearly_constant_images_are_noticed() -> None:
    with pytest.warns(UserWarning, match="nothing but values from 0"):
        check_batch(unet(), torch.zeros(4, 3, 8, 8))
    check_batch(unet(), torch.zeros(1, 3, 8, 8))  # one image may be


def test_the_label_of_no_class_is_one() -> None:
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, sample_size=8, num_layers=1, num_embeds_ada_norm=5
    )
    check_batch(model, (images(channels=4), torch.tensor([0, 1, 4, 5])))
    with pytest.raises(ValueError, match="has 6 classes"):
        check_batch(model, (images(channels=4), torch.tensor([0, 1, 4, 6])))


@pytest.mark.parametrize(
    "batch",
    [(images(), torch.arange(4)), {"images": images(), "depth": torch.ones(4, 1, 8, 8)}],
    ids=["labels", "a tensor"],
)
def test_what_is_not_used_is_said_once(batch: Any, caplog: pytest.LogCaptureFixture) -> None:
    _say_unused.cache_clear()
    with caplog.at_level(logging.WARNING):
        check_batch(unet(), batch)
        check_batch(unet(), batch)
    assert caplog.text.count("it is not used") == 1


def pictures() -> list[Any]:
    pixels = ((images() + 1) * 127.5).round().byte().movedim(1, -1).numpy()
    return [Image.fromarray(x) for x in pixels]


FORMS: dict[str, Callable[[], Any]] = {
    "numpy": lambda: images().numpy(),
    "a pair of numpy": lambda: (images().numpy(), np.arange(4) % 3),
    "the key input": lambda: {"input": images()},
    "PIL": pictures,
    "PIL with labels": lambda: {"image": pictures(), "label": torch.arange(4) % 3},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("door", DOORS)
def test_batches_come_in_the_forms_that_people_have(door: str, form: str) -> None:
    labels = "pair" in form or "labels" in form
    model = unet(num_class_embeds=3) if labels else unet()
    assert DOORS[door](model, FORMS[form]()) is not None


def test_pictures_become_what_models_are_trained_on() -> None:
    torch.testing.assert_close(as_batch(pictures()), images(), atol=1 / 127, rtol=0)
    grey = as_batch(Image.fromarray(np.zeros((4, 6), np.uint8)))
    assert (grey.shape, float(grey.max())) == ((1, 1, 4, 6), -1.0)
    with pytest.raises(ValueError, match="PIL images of the sizes"):
        as_batch([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))])


def test_a_batch_of_tensors_is_handed_on_as_it_is() -> None:
    class Encoding(dict):
        """With attributes, as transformers' have."""

    for batch in (Encoding(pixel_values=images()), (images(), ["a", "b"]), [images()], "anything", None):
        assert as_batch(batch) is batch
    frozen = images().numpy()[::-1]
    frozen.flags.writeable = False
    assert torch.equal(as_batch(frozen), images().flip(0))


def test_one_big_tensor_is_cut_into_batches() -> None:
    whole = images(150)
    for loader in (whole, whole.numpy()):
        batches = list(as_loader(loader))
        assert [len(b) for b in batches] == [64, 64, 22]
        assert torch.equal(torch.cat(batches), whole)
    assert len(finetune(unet(), whole, steps=3, progress=False).losses) == 3


def test_a_view_of_a_larger_storage_is_named_before_scoring() -> None:
    model = unet()
    model.conv_in.weight = nn.Parameter(torch.randn(16, 3, 3, 3)[:8])
    with pytest.raises(ValueError, match=r"conv_in\.weight .* view of a larger storage"):
        check_weights(model)
    with pytest.raises(ValueError, match=r"conv_in\.weight"):
        scored(model, images())


def test_adapters_are_looked_into() -> None:
    class Peft(nn.Module):
        """What peft's wrapper does, as far as anybody looks at it."""

        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_model, self.peft_config = base, {"default": None}

        def get_base_model(self) -> nn.Module:
            return self.base_model

    inner = unet()
    assert unwrapped(Peft(inner)) is inner
    assert dpf.score_and_prune(Peft(inner), None, criterion="magnitude", ratio=0.3).model is inner


def test_weights_whose_sum_overflows_are_finite() -> None:
    layer = nn.Linear(4, 4)
    nn.init.constant_(layer.weight, 3e38)
    assert check_weights(layer) == torch.device("cpu")


def test_infinities_of_both_signs_are_found() -> None:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0], layer.weight[1, 1] = torch.inf, -torch.inf
    with pytest.raises(ValueError, match=r"^weight has 2 NaN or infinite values"):
        check_weights(layer)
