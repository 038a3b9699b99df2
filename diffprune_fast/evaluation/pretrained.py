"""Figures of networks that others trained: LPIPS and the CLIP score, through torchmetrics."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choices import Backbone, check_choice

# A further figure: from samples, and the dense model's of the same seed (None without a dense model), both in [-1, 1].
Scorer = Callable[[Tensor, "Tensor | None"], float]
# The backbones' strides leave nothing of smaller images.
LEAST = 64


def lpips(network: Backbone | Callable[[Tensor, Tensor], Tensor] = "alex") -> Scorer:
    """The mean perceptual distance of samples to the dense model's; 0 for equal ones. Images under 64 pixels are
    enlarged.

    network: of LPIPS (Zhang et al., 2018), whose weights torchvision downloads; or a callable in its place, from two
    sets of images to their distances.

    Raises ModuleNotFoundError without torchmetrics and torchvision, ValueError where the weights can't be had or the
    network isn't known.
    """
    distance = network if callable(network) else _network(network)

    def score(images: Tensor, dense: Tensor | None) -> float:
        if dense is None:
            raise ValueError("LPIPS compares with the dense model's samples: there are none")
        with torch.no_grad():
            return float(distance(_coloured(images), _coloured(dense.to(images.device))).mean())

    return score


def _network(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    check_choice("network", name, Backbone)
    import torchvision  # noqa: F401 (torchmetrics names no module when it is lacking)
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity(net_type=name).eval()
    except OSError as error:
        raise ValueError(f"the weights of LPIPS ({name}) can't be had: {error}") from error


def _coloured(images: Tensor) -> Tensor:
    x = images.float().clamp(-1, 1)
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    factor = max(1, -(-LEAST // min(x.shape[-2:])))
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False) if factor > 1 else x


def clip_score(
    prompts: Sequence[str],
    model: str | os.PathLike[str] | Callable[[], tuple[Any, Any]] = "openai/clip-vit-base-patch16",
) -> Scorer:
    """How well samples fit their prompts, which are used in turn: 100 times the cosine of CLIP's features, at least 0.

    model: a folder of a CLIP model of transformers with its processor, its name on the hub, or a callable that gives
    both.

    Source: Hessel et al., 2021 (arXiv 2104.08718).

    Raises ModuleNotFoundError without torchmetrics and transformers, ValueError where there is no prompt or the weights
    can't be had.
    """
    from torchmetrics.functional.multimodal import clip_score as measured

    if not prompts:
        raise ValueError("the CLIP score needs prompts: there are none")
    both = model() if callable(model) else _clip(model)

    def score(images: Tensor, dense: Tensor | None) -> float:
        texts = [prompts[i % len(prompts)] for i in range(len(images))]
        x = images.float().cpu().clamp(-1, 1)
        pixels = ((x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x) + 1) * 127.5
        with torch.no_grad():
            return float(measured(list(pixels.round().to(torch.uint8)), texts, model_name_or_path=lambda: both))

    return score


def _clip(name: str | os.PathLike[str]) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    try:
        return CLIPModel.from_pretrained(name).eval(), CLIPProcessor.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"the CLIP model {name} can't be had: {str(error).splitlines()[0]}") from error
