"""Make trained diffusion models smaller and faster by removing whole channels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "trace": "tracing",
    "Plan": "plan",
    "score": "scoring",
    "Scores": "scoring",
    "select": "selection",
    "prune": "slicing",
    "compensate": "compensation",
    "score_blocks": "depth",
    "drop_blocks": "depth",
    "PruneResult": "result",
    "finetune": "recovery",
    "score_and_prune": "method",
    "sweep": "budget_sweep",
    "from_pretrained": "checkpoint",
    "pipeline_from_pretrained": "pipelines",
    "CheckpointError": "checkpoint",
    "ops": "ops",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    """Load a public name's module on first use, so that importing the package stays quick."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_PUBLIC[name]}")
    return module if name == "ops" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from . import ops as ops
    from .budget_sweep import sweep as sweep
    from .checkpoint.errors import CheckpointError as CheckpointError
    from .checkpoint.loading import from_pretrained as from_pretrained
    from .compensation.compensate import compensate as compensate
    from .depth.drop_blocks import drop_blocks as drop_blocks
    from .depth.score_blocks import score_blocks as score_blocks
    from .method import score_and_prune as score_and_prune
    from .pipelines.loading import pipeline_from_pretrained as pipeline_from_pretrained
    from .plan.plan import Plan as Plan
    from .recovery.finetune import finetune as finetune
    from .result import PruneResult as PruneResult
    from .scoring.score import score as score
    from .scoring.scores import Scores as Scores
    from .selection.select import select as select
    from .slicing.prune import prune as prune
    from .tracing.trace import trace as trace
