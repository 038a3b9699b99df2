"""What is raised of a checkpoint, and what readers of another kind are told."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, incomplete, inconsistent or hostile; the message says which file and what to do."""


# Stands where diffusers looks for the names of weight files, so that its error says it.
ADVICE = "a pruned model: load this folder with diffprune_fast.from_pretrained"
