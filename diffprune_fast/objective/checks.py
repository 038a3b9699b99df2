"""What is checked of a model and of its data before they are used: by scoring, compensation, training, evaluation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .conditioning import config_of, read_batch
from .loss import LossFunction, images_of
from .nested import tensors_in
from .shards import fsdp_modules, is_spread, local, shards_of

# No image in [0, 1] is as bright, and nearly all from 0 to 255 are brighter.
BRIGHTEST = 2.0

# No normalised image is as far from zero, and no latent of diffusers' autoencoders.
FARTHEST = 100.0

# Of a batch of images: less than half a step of 8 bits.
CONSTANT = 1 / 512

_SUMMED = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def check_weights(model: nn.Module, *, sharded: bool = False) -> torch.device:
    """The one device that the model's parameters are on. sharded: this rank's part of them is looked at.

    Raises ValueError, naming the parameter, for NaN or infinite weights, weights on ``meta``, on several devices or,
    unless it is expected, sharded over ranks.
    """
    if not sharded:
        check_whole(model)
    device: torch.device | None = None
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: load the weights before scoring")
        if isinstance(tensor, nn.Parameter):
            if not sharded:
                _check_own_memory(name, tensor)
            if device is not None and tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, others are on {device}: move the model to one device")
            device = tensor.device
        if tensor.is_floating_point():
            values = local(tensor.detach())
            # A buffer may be infinite on purpose (attention masks).
            finite = isinstance(tensor, nn.Parameter)
            bad = None if _sums_up(values) else ~values.isfinite() if finite else values.isnan()
            if bad is not None and bool(bad.any()):
                raise ValueError(f"{name} has {int(bad.sum())} NaN or infinite values: the model can't be scored")
    if device is None:
        raise ValueError(f"{type(model).__name__} has no parameters to score")
    return device


def _sums_up(values: Tensor) -> bool:
    """Whether the sum is finite, so that every value is: one pass without temporaries. (Large values may overflow.)"""
    return values.dtype in _SUMMED and math.isfinite(values.sum().item())


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError for a model whose parameters are spread over ranks, unless by FSDP2 and all that are trained."""
    if shards_of(model) is None:
        check_whole(model)
        return
    for name, p in model.named_parameters():
        if p.requires_grad and not is_spread(p):
            raise ValueError(
                f"{name} isn't sharded, others are: its gradient would stay with its rank. Call fully_shard(model) of "
                "the whole model too, after its parts"
            )


def check_whole(model: nn.Module) -> None:
    """Raise ValueError for a model whose parameters are spread over ranks: no rank has all of one."""
    sharded = bool(fsdp_modules(model))
    for name, p in model.named_parameters():
        if sharded or is_spread(p):
            raise ValueError(
                f"{name} is sharded over ranks (FSDP2 or tensor parallelism): this is for whole models, of which the "
                "smaller one may be sharded, fully_shard(result.model). What fully_shard has sharded already takes "
                "trace, score, select, slicing.prune_sharded and finetune"
            )


def _check_own_memory(name: str, parameter: Tensor) -> None:
    """Raise ValueError for a parameter that can be scored but not sliced: better now than after minutes."""
    if type(parameter) is not nn.Parameter:
        return  # a tensor subclass, whose memory is its own affair
    wanted = parameter.numel() * parameter.element_size()
    if parameter.storage_offset() != 0 or parameter.untyped_storage().nbytes() > wanted:
        raise ValueError(
            f"{name} of shape {tuple(parameter.shape)} is a view of a larger storage, whose memory stays taken; "
            f"give it its own: {name}.data = {name}.data.clone()"
        )


def check_batch(model: nn.Module, batch: Any, loss_fn: LossFunction | None = None) -> None:
    """Raise ValueError or TypeError, with the cause and what to do, for a batch that the model can't be used with.

    The one door for data: whatever is scored, compensated, trained or evaluated comes through here. A ``loss_fn`` gets
    the batch as it is, so that only the images are looked at.
    """
    check_images(model, batch, channels=loss_fn is None)
    if loss_fn is None:
        check_conditioning(model, read_batch(model, batch)[1])


def check_images(model: nn.Module, batch: Any, *, channels: bool = True) -> None:
    """Raise ValueError unless the batch's images are finite floats with the model's number of channels.

    channels: False skips the comparison with ``model.config.in_channels`` (a custom ``loss_fn`` may add channels), and
    lets pass images of another range.
    """
    images = images_of(batch)
    if not images.is_floating_point():
        raise ValueError(
            f"the loader yields {images.dtype} images; give floats, as in training: usually in [-1, 1], which "
            "x.float() / 127.5 - 1 makes of 0 to 255"
        )
    if images.numel() == 0:
        raise ValueError(f"the loader yields an empty batch of shape {tuple(images.shape)}")
    if not bool(images.isfinite().all()):
        bad = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        raise ValueError(f"NaN or infinity in the loader's images (positions {bad[:8]} of a batch of {len(images)})")
    wanted = in_channels(model) if channels else None
    if wanted is not None and images.shape[1] != wanted:
        last = images.shape[-1] == wanted and images.ndim > 2
        raise ValueError(
            f"the model takes images of {wanted} channels, the loader yields {images.shape[1]} "
            f"(batch of shape {tuple(images.shape)})"
            + (": the channels are last, images.movedim(-1, 1) puts them where they belong" if last else "")
        )
    if channels:
        _check_range(images, pixels=wanted in (1, 3))


def _check_range(images: Tensor, pixels: bool) -> None:
    low, high = float(images.amin()), float(images.amax())
    # Latents and normalised images have negative values too.
    if pixels and ((low >= 0 and high > BRIGHTEST) or max(-low, high) > FARTHEST):
        raise ValueError(
            f"the loader's images go from {low:g} to {high:g}: diffusion models are trained on [-1, 1], which "
            "x / 127.5 - 1 makes of 0 to 255 (a model trained on other numbers: loss_fn)"
        )
    if len(images) > 1 and high - low < CONSTANT:
        warnings.warn(
            f"a batch of {len(images)} images has nothing but values from {low:g} to {high:g}: look at what the loader "
            "yields; scores from it say little about real images",
            stacklevel=2,
        )


def in_channels(model: nn.Module) -> int | None:
    """Channels of the model's images: ``config.in_channels``, else those of its first convolution, else unknown."""
    configured = config_of(model).get("in_channels")
    if isinstance(configured, int):
        # Packed latents (Flux and its kin) are (batch, tokens, channels): the second dim is not the channels.
        return configured if any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in model.modules()) else None
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    return None if first is None else first.in_channels


def check_conditioning(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError for conditioning of another width than the model's, NaN, and labels that it has no row for."""
    for name, value in inputs.items():
        for tensor in tensors_in(value):
            # A mask may be infinite on purpose.
            if tensor.is_floating_point() and "mask" not in name and not bool(tensor.isfinite().all()):
                raise ValueError(f"NaN or infinity in the loader's {name}: look at the encoder that made it")
    widths = _widths(config_of(model))
    for name, wanted in widths.items():
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] != wanted:
            raise ValueError(
                f"{type(model).__name__} takes {name} of width {wanted}, the loader's have {value.shape[-1]} (shape "
                f"{tuple(value.shape)}): they are of another text encoder"
            )
    labels, most = inputs.get("class_labels"), _classes(config_of(model))
    if isinstance(labels, Tensor) and most is not None:
        if labels.is_floating_point():
            raise ValueError(f"class_labels are {labels.dtype}: {type(model).__name__} takes integers below {most}")
        if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= most):
            raise ValueError(
                f"class_labels go from {int(labels.min())} to {int(labels.max())}, {type(model).__name__} has {most} "
                f"classes, 0 to {most - 1}: give the numbers that it was trained with"
            )


def _widths(config: Mapping[str, Any]) -> dict[str, int]:
    """Conditioning inputs whose last dim follows from the config."""
    text = ("encoder_hid_dim", "caption_channels", "joint_attention_dim", "cross_attention_dim")
    known = next((config[name] for name in text if config.get(name) is not None), None)
    pooled = config.get("pooled_projection_dim")
    plain = config.get("encoder_hid_dim_type") in (None, "text_proj")
    found = {"encoder_hidden_states": known if plain else None, "pooled_projections": pooled}
    return {name: width for name, width in found.items() if isinstance(width, int)}


def _classes(config: Mapping[str, Any]) -> int | None:
    """How many class labels a model has rows for, where that is known."""
    if config.get("norm_type") == "ada_norm_zero" and isinstance(config.get("num_embeds_ada_norm"), int):
        return int(config["num_embeds_ada_norm"]) + 1  # the last row is that of no class
    known = config.get("num_class_embeds")
    return known if isinstance(known, int) and config.get("class_embed_type") is None else None
