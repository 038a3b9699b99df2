"""What a user chooses by name: one ``Literal`` alias serves signature, check, message and command line.

Nothing heavy is imported here: the command line's help stands on it.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

# Tracing: what can be removed of an attention.
Units = Literal["auto", "dims", "heads"]
# Selection and slicing: "exact" keeps the membership of norm groups, "count" only their divisibility.
NormGroups = Literal["count", "exact"]
# Scoring: what is summed, see `score`.
Estimator = Literal["micro", "mean", "reference", "reference-quad"]
CriterionName = Literal["diff-pruning", "taylor", "fisher", "magnitude", "random"]
VariantName = Literal["paper", "ddpm_exp", "ddpm_prune", "ldm_exp"]
Autocast = Literal["bf16", "bfloat16"]
# Selection, see `select`.
RankingName = Literal["local", "global"]
Allocation = Literal["gauss-newton", "measured", "mean"]
Rounding = Literal["reference"]
Offsets = Literal["independent", "same"]
# What the widths of a result have to be: any, or those of a config of its class.
Layouts = Literal["free", "config"]
# Depth: how a block's worth is found, see `score_blocks`.
BlockMethod = Literal["first-order", "loss"]
# Compensation: what the layers are solved for, see `compensate`.
CompensationMode = Literal["auto", "full", "channels"]
# Recovery: what a step minimises, see `finetune`.
RecoveryLoss = Literal["noise", "distillation", "mixed", "features", "second-order"]
# Sampling: how DDIM's timesteps are spaced, see `sample`.
Spacing = Literal["uniform", "quadratic"]
# Sampling: diffusers' caches, see `sample`.
Cache = Literal["first-block", "pyramid-attention", "faster-cache"]
# Evaluation: the network of LPIPS.
Backbone = Literal["alex", "vgg", "squeeze"]
Precision = Literal["no", "bf16", "fp16"]


def check_choice(name: str, value: object, alias: Any) -> None:
    """Raises ValueError where ``value``, given as ``name``, is none of the names of a ``Literal`` alias."""
    if value not in get_args(alias):
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, get_args(alias)))}")
