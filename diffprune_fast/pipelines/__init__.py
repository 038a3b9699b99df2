"""Whole diffusers pipelines: which component is pruned, what it is trained with, how the pipeline is kept.

``components`` finds the component and puts the pruned one back, ``encoding`` turns images and captions into what the
denoiser takes (``latents``: the part about images), ``saving`` writes and reads pipelines with pruned components.
"""

from __future__ import annotations

from .components import DENOISERS, find_component, image_shape, is_pipeline, takes_captions
from .encoding import check_known, encoded, example_call
from .opening import opened
from .saving import pipeline_from_pretrained, read_index

__all__ = [
    "DENOISERS",
    "check_known",
    "encoded",
    "example_call",
    "find_component",
    "image_shape",
    "is_pipeline",
    "opened",
    "pipeline_from_pretrained",
    "read_index",
    "takes_captions",
]
