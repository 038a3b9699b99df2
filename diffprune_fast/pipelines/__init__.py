"""Whole diffusers pipelines: which component is pruned, what it is trained with, how the pipeline is kept."""

from __future__ import annotations

from .components import DENOISERS, find_component, image_shape, is_pipeline, takes_captions
from .encoding import check_known, encoded, example_call
from .index import read_index
from .loading import pipeline_from_pretrained
from .own_samples import own_batches
from .target import Target, find_target

__all__ = [
    "DENOISERS",
    "Target",
    "check_known",
    "encoded",
    "example_call",
    "find_component",
    "find_target",
    "image_shape",
    "is_pipeline",
    "own_batches",
    "pipeline_from_pretrained",
    "read_index",
    "takes_captions",
]
