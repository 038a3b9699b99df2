"""What pruning returns: the smaller model with everything that says how it came to be."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .checkpoint.manifest import pack_runs
from .checkpoint.saving import files_of, save
from .compensation.compensate import Compensation
from .footprint.promise import Promise
from .objective.isolation import unwrapped
from .objective.ranks import rank_and_count
from .objective.shards import fsdp_modules
from .plan.plan import Complexity, Plan, unreached
from .pruned.record import attach_record, is_settable, record_of
from .report.card import CARD, TAG, facts_of, write_card
from .report.figures import kept_channels, loss_curve
from .report.page import write_report
from .report.table import Measured
from .report.whole import kept_whole
from .rotation.rotate import Rotation
from .scoring.scores import BlockScores, Scores
from .selection.select import Selection


@dataclass(frozen=True)
class Proof:
    """What one real forward of the sliced model, beside the dense one with its channels masked, has shown.

    calls: how many operations both called, one by one the same. error: the distance of their outputs, as a share of
    the norm; None where they can't be compared. note: why not.
    """

    calls: int
    error: float | None
    note: str = ""

    def __str__(self) -> str:
        if self.error is None:
            return f"outputs not compared: {self.note}"
        return f"{self.calls} operations alike in a real forward, outputs differ by {self.error:.1e} of their norm"


@dataclass(frozen=True)
class PruneResult:
    """A pruned model and its proof.

    model: the pruned model. plan: the plan of the model as it was. keep: group name to the sorted unit indices that
    stay. before, after: what it cost and what it costs. shapes: every parameter and floating-point buffer after
    slicing. attributes: the module attributes that slicing changed (``"conv_in.out_channels"`` to the new value).
    seconds: wall-clock time per stage. own_samples: images that the model made itself, where there was no data.
    dropped: the residual blocks that were taken out first, blocks: what each would
    have cost; then ``plan`` is that of the model without them and ``before`` what it cost with them. rotation: the
    attention heads that got another basis first. compensation: the losses of the dense, the sliced and the compensated
    model, and the layers that were solved. proof: what a real forward has shown of the slicing, before compensation;
    None where it was left out. promises: budgets of time and memory, as asked, predicted and measured. pipeline,
    component: the diffusers pipeline that the model is part of, and the model's name there; None for a model alone.
    """

    model: nn.Module
    plan: Plan
    keep: Mapping[str, np.ndarray]
    before: Complexity
    after: Complexity
    norm_groups: str = "count"
    scores: Scores | None = None
    selection: Selection | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    own_samples: int = 0
    dropped: tuple[str, ...] = ()
    blocks: BlockScores | None = None
    rotation: Rotation | None = None
    compensation: Compensation | None = None
    proof: Proof | None = None
    promises: tuple[Promise, ...] = ()
    pipeline: Any = None
    component: str | None = None

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write safetensors, ``config.json`` and ``diffprune.json`` into ``directory``; the whole pipeline, if one was
        given. variant: a part of the weights' names (``"fp16"``). max_shard_size: the most bytes of one file of them.

        Raises ValueError where the pipeline doesn't have the pruned component any more; CheckpointError for a model
        without memory or with state that isn't tensors; OSError from the disk.
        """
        how: Any = {"variant": variant, "max_shard_size": max_shard_size}
        if self.pipeline is None:
            save(self.model, directory, **how)
            return None if fsdp_modules(self.model) and rank_and_count()[0] else _card(directory)
        assert self.component is not None
        held = self.pipeline.components.get(self.component)
        if held is None or unwrapped(held) is not self.model:
            raise ValueError(
                f"the pipeline's {self.component} is not the pruned one any more: put result.model back, or save what "
                "there is with the pipeline's own save_pretrained"
            )
        self.pipeline.save_pretrained(directory, **how)
        _card(directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> str:
        """Save into a repository of the Hugging Face hub, which is made if need be; gives the commit's address.

        A former upload's shards and lists of them go. variant, max_shard_size: see :meth:`save_pretrained`.
        Raises what that raises, and the hub's errors.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, variant=variant, max_shard_size=max_shard_size)
            api.create_repo(repo_id, private=private, exist_ok=True)
            of_before = [f"{self.component}/{p}" if self.component else p for p in files_of(variant).patterns]
            message = commit_message or f"{type(self.model).__name__}, pruned"
            return str(
                api.upload_folder(
                    repo_id=repo_id, folder_path=directory, commit_message=message, delete_patterns=of_before
                )
            )

    def report(self, path: str | os.PathLike[str], *, title: str = "") -> Path:
        """Write a page of what is known without further measuring: budget, losses before and after compensation, what
        stayed of every group, which timesteps count. The numbers are beside it as JSON and CSV; gives the path.

        Raises ModuleNotFoundError without matplotlib and jinja2 (``pip install 'diffprune-fast[report]'``).
        """
        solved = self.compensation if self.compensation is not None and self.compensation.layers else None
        losses = [] if solved is None else [("sliced", solved.sliced), ("compensated", solved.compensated)]
        name = type(self.model).__name__
        rows = [
            Measured("original", *self._cost(self.before), stages={"": {"loss": solved.dense}} if solved else {}),
            Measured("pruned", *self._cost(self.after), stages={stage: {"loss": loss} for stage, loss in losses}),
        ]
        whole = kept_whole(self.plan, self.keep)
        figures = {"Kept channels": (kept_channels(self.plan, self.keep), "Each bar is a group, and what stays of it.")}
        if self.scores is not None and self.scores.curve is not None:
            about = "Channels are scored at the timesteps whose loss is above the threshold."
            figures["Which timesteps count"] = (loss_curve(self.scores.curve), about)
        return write_report(Path(path), rows, figures, title=title or f"{name}, pruned", result=self, whole=whole)

    @staticmethod
    def _cost(of: Complexity) -> tuple[int, int]:
        return of.params, of.macs

    def facts(self) -> dict[str, str]:
        """How it came to be, as lines of a table."""
        facts = facts_of(noted(self))
        if self.selection is not None:
            facts["allocation"] = self.selection.allocation
        facts["norm groups"] = self.norm_groups
        if self.compensation is not None:
            facts["compensation"] = str(self.compensation).splitlines()[0]
        if self.seconds:
            facts["time"] = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        return facts

    def __repr__(self) -> str:
        """One line; ``str(result)`` has the rest."""
        what = f"{type(self.model).__name__}: {self.before} -> {self.after}"
        return f"PruneResult({what}{', without ' + ', '.join(self.dropped) if self.dropped else ''})"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        rows = [line.partition(":") for line in str(self).splitlines()]
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text.strip())}</td></tr>" for name, _, text in rows)
        return f"<table>{cells}</table>"

    def __str__(self) -> str:
        lines = [f"before: {self.before}", f"after:  {self.after}"]
        if self.selection is not None:
            lines += [f"asked:  {self.selection.asked}", f"met:    {self.selection.met}"]
            lines += [f"note:   {note}" for note in self.selection.notes]
        lines += [str(promise) for promise in self.promises]
        if self.dropped:
            lines.append(f"blocks dropped: {', '.join(self.dropped)}")
        lines.append(f"norm groups: {self.norm_groups}")
        if self.own_samples:
            lines.append(f"without data: from {self.own_samples} images that the model made itself")
        if self.scores is not None and self.scores.agreement is not None:
            lines.append(f"split-half agreement: {self.scores.agreement:.3f} after {self.scores.samples} samples")
        if self.rotation is not None:
            lines.append(f"heads: {str(self.rotation).splitlines()[0]}")
        if self.proof is not None:
            lines.append(f"proof: {self.proof}")
        if self.compensation is not None:
            lines += str(self.compensation).splitlines()
        lines += [f"note:   {note}" for note in self.plan.notes]
        if aside := unreached(self.plan):
            first = ", ".join(aside[:3]) + (", …" if len(aside) > 3 else "")
            lines.append(
                f"note:   {len(aside)} parameters were not reached by the example call ({first}): calls that use them "
                "won't fit"
            )
        return "\n".join(lines)


def _card(directory: str | os.PathLike[str]) -> None:
    """A model card, unless somebody wrote another ``README.md`` there."""
    path = Path(directory) / CARD
    if not path.exists() or TAG in path.read_text(encoding="utf-8"):
        write_card(directory)


def record(result: PruneResult, **more: Any) -> PruneResult:
    """The result with ``more`` in its fields; its module's record, and so what is saved of it, says the same."""
    result = replace(result, **more)
    attach_record(result.model, replace(record_of(result.model), about=noted(result)))
    return result


def noted(result: PruneResult) -> dict[str, Any]:
    """How a pruned model came to be, as plain JSON values: keep-sets, budget, scores, what it cost and costs."""
    about: dict[str, Any] = {
        "plan": result.plan.hash,
        "attributes": {name: value for name, value in result.attributes.items() if is_settable(value)},
        "keep": {name: pack_runs(units) for name, units in result.keep.items()},
        "norm_groups": result.norm_groups,
        "seed": result.seed,
        "own_samples": result.own_samples,
        "before": {"params": result.before.params, "macs": result.before.macs},
        "after": {"params": result.after.params, "macs": result.after.macs},
        "seconds": result.seconds,
        "blocks_dropped": list(result.dropped),
    }
    if result.selection is not None:
        chosen = result.selection
        about["budget"] = {
            "asked": chosen.asked,
            "met": chosen.met,
            "ranking": chosen.ranking,
            "notes": list(chosen.notes),
        }
    if result.promises:
        about["promises"] = [_plain_value(asdict(promise)) for promise in result.promises]
    if result.proof is not None:
        about["proof"] = _plain_value(asdict(result.proof))
    if result.compensation is not None:
        about["compensation"] = _plain_value(asdict(result.compensation))
    if result.scores is not None:
        about["scores"] = _plain_value(result.scores.summary())
    return about


def _plain_value(value: Any) -> Any:
    """JSON has no NaN and no NumPy."""
    if isinstance(value, dict):
        return {str(k): _plain_value(v) for k, v in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain_value(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
