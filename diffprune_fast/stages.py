"""The stages of the method: what each of them is given, what it leaves to the next, and the way back."""

from __future__ import annotations

import difflib
import inspect
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from . import compensation
from .architectures.inputs import knows_inputs
from .choices import CompensationMode, Layouts, NormGroups, Units
from .depth.shallower import Budget, Shallower, shallower
from .objective.batches import replayed
from .objective.calls import first_call
from .objective.checks import check_whole
from .ops.slice_channels import Step
from .pipelines.encoding import example_call
from .pipelines.target import are_prompts, find_target, own_loader
from .plain.wishes import wish_for
from .plan.keep_sets import sliced_shapes
from .plan.plan import Plan
from .promises import costs_of, keep_promises, measurable
from .pruned.record import record_of
from .result import PruneResult
from .rotation.rotate import Rotation, rotate_heads
from .scoring.criteria import CRITERIA
from .scoring.score import score
from .scoring.scores import rehearsed_scores
from .selection.budgets import Budget as OneBudget
from .selection.costs import Cost
from .selection.select import Selection, select
from .sensitivity.measure import measure_sensitivities
from .slicing.commit import Change, gradients_as_now, undo
from .slicing.optimizers import check_optimizer
from .slicing.prune import checked, dry_run, prepared, prune
from .tracing.trace import trace


class Stages:
    """One run of the method. Every stage reads what those before it have left here; the model changes in the last one.

    Heads that were rotated and blocks that were taken out on the way go back by :meth:`undo`.
    """

    def __init__(
        self,
        model: Any,
        loader: Iterable[Any] | None,
        *,
        component: str | None,
        budget: Budget,
        norm_groups: NormGroups,
        inplace: bool,
        optimizer: torch.optim.Optimizer | None,
        example_inputs: Any,
        compensate: CompensationMode | bool,
        proof: bool,
        seed: int,
        scoring: dict[str, Any],
        selecting: dict[str, Any],
    ) -> None:
        """As :func:`score_and_prune`; scoring, selecting: further options of ``score`` and ``select``."""
        self.budget = budget
        self.inplace, self.optimizer, self.norm_groups = inplace, optimizer, norm_groups
        self.mode, self.seed = compensate, seed
        self.scoring, self.selecting = scoring, selecting
        self.tries = selecting.get("allocation") == "measured"
        self.progress = scoring.get("progress", True)
        self.own = None
        if are_prompts(loader) or (loader is None and self._needs_data()):
            found = own_loader(model, loader, scheduler=scoring.get("scheduler"), seed=seed, progress=self.progress)
            loader = self.own = found
        self.target = find_target(model, component, loader, {**scoring, **selecting})
        self.dense = self.target.model
        check_whole(self.dense)
        check_optimizer(self.dense, optimizer, inplace)
        scoring["scheduler"] = self.target.scheduler
        self.training = {"seed": seed, "scheduler": self.target.scheduler, "loss_fn": scoring.get("loss_fn")}
        self.example_inputs, loader = self._inputs(example_inputs)
        self.loader = None if loader is None else replayed(loader)
        self.slicing: dict[str, Any] = {
            "norm_groups": norm_groups,
            "example_inputs": self.example_inputs,
            "backend": scoring.get("backend", "auto"),
            "proof": proof,
        }
        self.shallow: Shallower | None = None
        self.rotation: Rotation | None = None
        self.seconds: dict[str, float] = {}
        self._back = gradients_as_now()  # what gives everything back as it was, until the commit begins

    @property
    def promised(self) -> tuple[OneBudget, ...]:
        """What of the budget is measured on the device."""
        return measurable(self.budget)

    def drop_blocks(self, which: int | str | Sequence[str], plan: Plan | None) -> None:
        """Takes whole residual blocks out; what the budget asks for is of the model with them."""
        if plan is not None or self.promised:
            raise ValueError(
                "drop_blocks changes what goes together: leave out plan, it is traced without the blocks"
                if plan is not None
                else "latency and memory are counted of the model as it is: call drop_blocks first, then prune the rest"
            )
        with self._timed("blocks"):
            self.shallow = shallower(
                self.dense,
                which,
                self.loader,
                self.budget,
                self._back,
                inplace=self.inplace,
                optimizer=self.optimizer,
                example_inputs=self.example_inputs,
                options={**self.scoring, "seed": self.seed},
            )
        self.dense, self.budget = self.shallow.model, self.shallow.budget
        self.inplace = self.inplace or self.shallow.is_copy

    def trace(self, plan: Plan | None, *, units: Units, like: Any = None, layout: Layouts = "free") -> None:
        """Finds which channels go together, and, for a budget of time or memory, what they cost."""
        with self._timed("trace"):
            self.ask(self.budget, like=like, layout=layout)
            self.plan = plan or trace(self.dense, self.example_inputs, units=self.wish.units(units))
        if self.promised:
            with self._timed("measure costs"):
                given, grain = self.selecting.get("costs", {}), self.selecting.get("round_to", 8)
                costs = costs_of(self.dense, self.plan, self.promised, given, grain, **self.slicing)
                self.selecting["costs"] = self.wish.options["costs"] = costs

    def ask(self, budget: Budget, *, like: Any = None, layout: Layouts = "free") -> None:
        """Says what the result is to be: the best under a budget, or a config's."""
        self.budget = budget
        self.wish = wish_for(
            self.dense,
            like=like,
            layout=layout,
            budget=budget,
            norm_groups=self.norm_groups,
            steps=int(getattr(getattr(self.target.scheduler, "config", None), "num_train_timesteps", None) or 1000),
            optimizer=self.optimizer,
            options=self.selecting,
        )

    def rehearse(self) -> None:
        """Selects by random scores and slices on ``meta``: whether budget, model and optimizer allow it at all."""
        with self._timed("rehearse"):
            chosen = self.wish.select(self.plan, rehearsed_scores(self.plan))
            how: dict[str, Any] = {"norm_groups": self.norm_groups, "example_inputs": self.example_inputs}
            sliced = dry_run(self.dense, self.plan, chosen.keep, **how)
            self.wish.check(self.dense, sliced)
            check_optimizer(self.dense, self.optimizer, self.inplace, {name for name, _ in sliced.kept})
        # nobody else would look at it
        self.scoring.setdefault("damage", chosen.allocation in ("gauss-newton", "measured"))

    def rotate_heads(self) -> None:
        """Gives attention heads a basis in which what they need least are single dims; not without data to find it, nor
        where an optimizer's state would be of another basis."""
        if self.optimizer is not None or self.loader is None:
            return
        with self._timed("rotate"):
            self._back.insert(0, self._rotate())

    def _rotate(self) -> Any:
        self.rotation = rotate_heads(self.dense, self.plan, self.loader, **self.training)
        return self.rotation.undo

    def score(self) -> None:
        """Which channels matter; where the allocation asks for it, also what every cluster costs when it goes alone."""
        with self._timed("score"):
            self.scores = score(self.dense, self.loader, self.plan, seed=self.seed, **self.scoring)
        if self.tries:
            known = keywords(measure_sensitivities)
            options = {name: value for name, value in {**self.scoring, **self.selecting}.items() if name in known}
            options |= {"seed": self.seed, "norm_groups": self.norm_groups}
            with self._timed("measure"):
                self.scores = measure_sensitivities(self.dense, self.loader, self.plan, self.scores, **options)

    def select(self) -> None:
        """The units that stay; where the budget can be measured, such that what is measured meets it."""

        costs: Mapping[str, Cost] = self.selecting.get("costs", {})

        def choose(now: Mapping[str, Cost]) -> Selection:
            self.wish.options["costs"] = {**costs, **now}
            return self.wish.select(self.plan, self.scores)

        with self._timed("select"):
            if self.promised:
                given = self.dense, self.plan, self.promised, costs, choose
                self.selection, self.promises = keep_promises(*given, **self.slicing)
            else:
                self.selection, self.promises = self.wish.select(self.plan, self.scores), ()

    def slice_and_compensate(self) -> None:
        """Makes the smaller model ready; with a loader it is solved on a copy, whose weights the model will take."""
        dense, plan, keep = self.dense, self.plan, self.selection.keep
        loader = None if self.mode is False else self.loader
        if loader is None and self.wish.is_of_widths:
            self.change = checked(dense, plan, keep, inplace=self.inplace, optimizer=self.optimizer, **self.slicing)
            return
        trial = self.wish.fulfil(prune(dense, plan, keep, inplace=False, **self.slicing))
        sliced = sliced_shapes(dense, plan, keep)
        found, seconds = None, trial.seconds
        if loader is not None:
            mode = "auto" if self.mode is True else self.mode
            how: dict[str, Any] = {"mode": mode, "autocast": self.scoring.get("autocast"), "progress": self.progress}
            how |= self.training
            found = compensation.compensate(trial.model, dense, loader, kept=sliced.kept, **how)
            seconds = {**seconds, "compensate": found.seconds}
        if not self.inplace:
            self.change = Change(replace(trial, compensation=found, seconds=seconds), (), record_of(trial.model))
            return
        solved = {name: p.data for name, p in trial.model.named_parameters()}
        taking: dict[str, Any] = {"solved": solved, "seconds": seconds}
        change = prepared(dense, plan, sliced, self.norm_groups, self.optimizer, self.slicing["backend"], **taking)
        further = self.wish.finishing(dense, trial.model, sliced)
        figures: dict[str, Any] = {"proof": trial.proof, "after": trial.after, "shapes": trial.shapes}
        self.change = change.and_then(further, compensation=found, **figures)

    def commit(self) -> PruneResult:
        """Changes the model, to the end; from here on there is no way back."""
        steps: list[Step] = []
        told: dict[str, Any] = {}
        if self.rotation is not None:
            steps.append(self.rotation.forget if self.inplace else self.rotation.undo)
        if self.shallow is not None:
            steps += self.shallow.finish
            told = self.shallow.told()
        change = self.change.and_then(
            steps,
            own_samples=0 if self.own is None else self.own.n,
            scores=self.scores,
            selection=self.selection,
            promises=self.promises,
            rotation=self.rotation,
            seed=self.seed,
            seconds={**self.seconds, **self.change.result.seconds},
            **told,
            **self.target.place_of(self.change.result.model),
        )
        return change.made([self._back.clear])

    def undo(self) -> None:
        """Everything as it was; nothing once the commit is through."""
        undo(self._back)

    def _needs_data(self) -> bool:
        """Whether without a loader the model has to make images itself: a loss of one's own needs one's own batches."""
        rule = CRITERIA.get(self.scoring.get("criterion", "diff-pruning"))
        asked = self.tries or self.mode not in (False, "auto")
        return self.scoring.get("loss_fn") is None and (asked or (rule is not None and rule.needs_data))

    def _inputs(self, given: Any) -> tuple[Any, Iterable[Any] | None]:
        """What the model is traced with, and the loader with nothing missing."""
        target = self.target
        if given is not None or knows_inputs(target.model):
            return given, target.loader
        if target.loader is not None:
            return first_call(target.model, target.loader, **self.training)
        return (None if target.pipeline is None else example_call(target.pipeline, target.component)), None

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Notes the stage's wall-clock seconds."""
        begin = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - begin


def by_function(options: Mapping[str, Any], also: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options by the function that takes them, ``score`` or ``select``; an unknown name is an error that offers the
    nearest one, of these or of ``also``."""
    of_score, of_select = keywords(score), keywords(select)
    for name in options:
        if name not in of_score | of_select:
            near = difflib.get_close_matches(name, of_score | of_select | also, 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"unknown option {name!r}{hint} (budgets are ratio, params, macs, latency, memory and like)"
            )
    return (
        {n: v for n, v in options.items() if n in of_score},
        {n: v for n, v in options.items() if n in of_select},
    )


def keywords(f: Any) -> set[str]:
    """The names of a function's keyword-only parameters."""
    return {p.name for p in inspect.signature(f).parameters.values() if p.kind is p.KEYWORD_ONLY}
