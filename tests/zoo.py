"""Tiny random configs of diffusers' architectures, and language-model blocks: what the oracle runs through.

Sizes are such that nothing is trivially right: several heads of several dims, norm groups of several channels, more
than one block where blocks share anything.
"""

from __future__ import annotations

from models import Case
from zoo_autoencoders import MORE_AUTOENCODERS
from zoo_image_transformers import IMAGE_TRANSFORMERS
from zoo_language import LANGUAGE_CASES
from zoo_newer_images import NEWER_IMAGES
from zoo_newer_videos import NEWER_VIDEOS
from zoo_others import OTHERS
from zoo_transformers import TRANSFORMERS
from zoo_unets import AUTOENCODERS, UNETS
from zoo_video_transformers import VIDEO_TRANSFORMERS

ZOO: list[Case] = [*UNETS, *AUTOENCODERS, *IMAGE_TRANSFORMERS, *VIDEO_TRANSFORMERS, *OTHERS, *LANGUAGE_CASES]

# Less common ones: the tests run one keep-set of each, benchmarks/architectures.py all.
MORE: list[Case] = [*MORE_AUTOENCODERS, *NEWER_IMAGES, *NEWER_VIDEOS]

__all__ = ["MORE", "TRANSFORMERS", "ZOO"]
