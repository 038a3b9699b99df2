"""What a pruned model is worth: samples from one noise, held-out loss, likeness, time, size."""

from __future__ import annotations

from .complexity import complexity
from .cost import forward_costs
from .evaluate import evaluate
from .loss import diffusion_loss, loss_by_timestep
from .sampling import sample
from .similarity import ssim
from .timing import seconds_per_image

__all__ = [
    "complexity",
    "diffusion_loss",
    "evaluate",
    "forward_costs",
    "loss_by_timestep",
    "sample",
    "seconds_per_image",
    "ssim",
]
