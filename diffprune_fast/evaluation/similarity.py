"""How alike two models' images are."""

from __future__ import annotations

from torch import Tensor

WINDOW = 11


def ssim(images: Tensor, reference: Tensor) -> float:
    """Mean structural similarity of every image to its counterpart; 1 for equal images.

    Args:
        images, reference: ``(n, channels, height, width)`` in [-1, 1], made from the same noise, at least 11 pixels
            each way.

    Returns:
        The mean over the images.

    Raises:
        ValueError: the shapes differ, or the images are smaller than the window.

    Example:
        >>> import torch
        >>> images = torch.rand(2, 3, 16, 16) * 2 - 1
        >>> round(ssim(images, images), 3)
        1.0

    Source: Wang et al., 2004 (Gaussian window of 11 pixels, sigma 1.5; whole windows only), computed by torchmetrics.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if images.shape != reference.shape:
        raise ValueError(
            f"images are {tuple(images.shape)} and the reference is {tuple(reference.shape)}: sample both models from "
            "the same noise"
        )
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(
            f"images are {tuple(images.shape[-2:])} pixels: SSIM's window needs at least {WINDOW} each way"
        )
    # SSIM's luminance term is a ratio of intensities: they have to be positive.
    light, expected = ((x.float() + 1) / 2 for x in (images, reference))
    return float(structural_similarity_index_measure(light, expected, sigma=1.5, data_range=1.0))
