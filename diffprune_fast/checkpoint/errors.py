"""What is raised of a checkpoint."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, incomplete, inconsistent or hostile; the message says which file and what to do."""
