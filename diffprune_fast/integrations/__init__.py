"""What this package's kernels, plans and compensation do inside other tools; nothing of theirs is imported here."""

from __future__ import annotations
