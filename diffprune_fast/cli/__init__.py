"""The command line."""

from __future__ import annotations

from . import prune  # noqa: F401 - a command is there once its file is imported
from .app import app, main

__all__ = ["app", "main"]
