"""Getting back what pruning cost: a short finetune."""

from __future__ import annotations

from .finetune import Finetuned, finetune

__all__ = ["Finetuned", "finetune"]
