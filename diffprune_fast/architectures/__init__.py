"""The one room that names classes of diffusers: adding an architecture means this folder and a test."""

from __future__ import annotations

from .inputs import calls_of, knows_inputs

__all__ = ["calls_of", "knows_inputs"]
