"""The command line: a command is there once its file is imported."""

from __future__ import annotations

from . import evaluate, finetune, prune, report, run, sampling  # noqa: F401
from .app import app, main

__all__ = ["app", "main"]
