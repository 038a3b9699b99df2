"""Tables of positions that a module computes anew for inputs of another size: a pruned one keeps some of the columns.

diffusers' patch embeddings make sine tables of the width that they have. After pruning that would be other columns than
the model was trained with, and nothing would fail. So the pruned module gets its table from hooks: that of the full
width, of which the kept columns stay.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, ...]


class Table(ABC):
    """How a class of modules holds its table, ``(1, positions, width)``, and makes it for a size."""

    buffer: str
    sizes: tuple[str, ...]  # the attributes that hold the size of the table in ``buffer``

    @abstractmethod
    def applies(self, module: Any) -> bool:
        """Whether the module recomputes its table where the inputs have another size."""

    @abstractmethod
    def wanted(self, module: Any, inputs: tuple[Any, ...]) -> Size:
        """The size of the table that these inputs need."""

    @abstractmethod
    def made(self, module: Any, size: Size, width: int, device: torch.device) -> Tensor:
        """The table of a module of ``width`` channels."""

    @abstractmethod
    def positions(self, module: Any, size: Size) -> int:
        """How many there are in a table of that size."""

    def held(self, module: Any) -> Size:
        return tuple(getattr(module, name) for name in self.sizes)

    def hold(self, module: Any, size: Size, table: Tensor) -> None:
        module._buffers[self.buffer] = table
        for name, value in zip(self.sizes, size):
            setattr(module, name, value)


class _PatchEmbed(Table):
    buffer, sizes = "pos_embed", ("height", "width")

    def applies(self, module: Any) -> bool:
        return module.pos_embed is not None and not module.pos_embed_max_size

    def wanted(self, module: Any, inputs: tuple[Any, ...]) -> Size:
        return tuple(n // module.patch_size for n in inputs[0].shape[-2:])

    def positions(self, module: Any, size: Size) -> int:
        return size[0] * size[1]

    def made(self, module: Any, size: Size, width: int, device: torch.device) -> Tensor:
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        table = get_2d_sincos_pos_embed(
            width,
            size,
            base_size=module.base_size,
            interpolation_scale=module.interpolation_scale,
            device=device,
            output_type="pt",
        )
        return table.float().unsqueeze(0)


class _CogVideoXPatchEmbed(Table):
    buffer, sizes = "pos_embedding", ("sample_height", "sample_width", "sample_frames")

    def applies(self, module: Any) -> bool:
        return module.use_positional_embeddings and not module.use_learned_positional_embeddings

    def wanted(self, module: Any, inputs: tuple[Any, ...]) -> Size:
        _, frames, _, height, width = inputs[1].shape
        return height, width, (frames - 1) * module.temporal_compression_ratio + 1

    def positions(self, module: Any, size: Size) -> int:
        height, width, frames = size
        patches = (height // module.patch_size) * (width // module.patch_size)
        return module.max_text_seq_length + patches * ((frames - 1) // module.temporal_compression_ratio + 1)

    def made(self, module: Any, size: Size, width: int, device: torch.device) -> Tensor:
        full = copy.copy(module)
        full.embed_dim = width
        return full._get_positional_embeddings(*size, device=device)


# By class of diffusers' own: others have a class called PatchEmbed too.
_MODULE = "diffusers.models.embeddings"
TABLES: Mapping[str, Table] = {"PatchEmbed": _PatchEmbed(), "CogVideoXPatchEmbed": _CogVideoXPatchEmbed()}


def table_of(module: nn.Module) -> Table | None:
    """The rule for a module that recomputes its table, else None."""
    theirs = vars(sys.modules[_MODULE]) if _MODULE in sys.modules else {}
    for name, table in TABLES.items():
        if name in theirs and isinstance(module, theirs[name]):
            return table if table.applies(module) else None
    return None
