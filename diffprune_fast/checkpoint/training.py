"""A pruned model in training scripts that build and load models by their class."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..architectures.configs import own_config
from .loading import from_pretrained
from .manifest import CONFIG


class PrunedClass:
    """Stands for a pruned model's class in scripts: its ``from_config`` and ``from_pretrained`` give pruned models.

    A model that a plain config describes needs none of this. For any other the class itself would build the widths
    before pruning.

    Args:
        model: the pruned model.

    Example:
        >>> from diffusers import UNet2DModel
        >>> from diffusers.training_utils import EMAModel
        >>> from diffprune_fast import score_and_prune
        >>> unet = UNet2DModel(8, block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2,
        ...                    up_block_types=("UpBlock2D",) * 2, norm_num_groups=4)
        >>> unet = score_and_prune(unet, None, criterion="magnitude", macs=0.6, round_to=4).model
        >>> ema = EMAModel(unet.parameters(), model_cls=PrunedClass(unet), model_config=unet.config)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = copy.deepcopy(model)

    def from_config(self, config: Any = None, return_unused_kwargs: bool = False, **_: Any) -> Any:
        """A pruned model like the one given; with ``return_unused_kwargs`` also what of the config isn't its class's.

        The config says nothing about widths: the weights are those of the model as it was given.
        """
        model = copy.deepcopy(self._model)
        if not return_unused_kwargs:
            return model
        if isinstance(config, (str, os.PathLike)):
            config = json.loads((Path(config) / CONFIG).read_text(encoding="utf-8"))
        known = own_config(model)
        return model, {k: v for k, v in dict(config).items() if k not in known and not k.startswith("_")}

    def from_pretrained(self, directory: str | os.PathLike[str], subfolder: str | None = None, **options: Any) -> Any:
        """:func:`from_pretrained` of the folder, or of the hub."""
        return from_pretrained(directory, subfolder=subfolder, **options)
