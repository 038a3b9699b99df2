"""The proof of a slicing: one real forward of the sliced model beside one of the dense model with its channels masked.

A walk on ``meta`` sees what a forward does there. Here the forward runs on numbers, before anything changes, in a copy
of the model with stand-ins for its parameters: first the channels that stay, then all with zeros in those that go. Both
must call the same operations and give the same output. Norms and means of the masked model run over as many channels as
those of the sliced one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..architectures.inputs import Call
from ..architectures.position_tables import table_of
from ..plan.keep_sets import Sliced
from ..plan.plan import Plan
from ..pruned.held_tensors import copied, tables
from ..result import Proof
from ..tracing.meta import device_of
from ..tracing.outputs import outputs_in
from ..tracing.verification import attributes_set
from .execute import Factor, norm_factors, scale_factors
from .real_calls import Cut, Different, Incomparable, Masked, Recorder
from .verify import SliceError

# Of the output's norm. Half precision is computed in float32; what exceeds it is looked at again in float64.
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-4}


def prove(model: nn.Module, plan: Plan, sliced: Sliced, calls: Sequence[Call]) -> Proof:
    """Run the sliced and the masked dense model once, on stand-ins: nothing of the model changes.

    Raises SliceError where they call other operations, or give another output.
    """
    found = Proof(0, None, "nothing was removed")
    if not sliced.kept:
        return found
    for dtype in (torch.float32, torch.float64):
        found = _prove(model, plan, sliced, calls, dtype)
        if found.error is None or found.error <= TOLERANCE[_computed_in(model, dtype)]:
            return found
    raise SliceError(
        f"the sliced {type(model).__name__} gives another output than the model whose removed channels are zero (by "
        f"{found.error:.1e} of its norm): its forward does in a real call what the trace didn't see. Keep the groups "
        "that this concerns (ignore=[...]), or leave the comparison out (proof=False)"
    )


def _computed_in(model: nn.Module, wanted: torch.dtype) -> torch.dtype:
    """What is computed in: float64 for a model of it, else what is wanted."""
    return torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else wanted


def _prove(model: nn.Module, plan: Plan, sliced: Sliced, calls: Sequence[Call], dtype: torch.dtype) -> Proof:
    dtype = _computed_in(model, dtype)
    for name, _, _, t in tables(model):  # kernels would read what isn't there
        if not t.is_meta and t.untyped_storage().nbytes() < t.numel() * t.element_size():
            return Proof(0, None, f"the memory of {name} was released")
    inputs = [(method, *_real((args, kwargs), device_of(model), dtype)) for method, args, kwargs in calls]
    factors: dict[str, list[Factor]] = {}
    for name, rows, factor in scale_factors(model, plan, sliced):
        factors.setdefault(name, []).append((rows, factor))
    left, by_norm = norm_factors(model, plan, sliced), {fix.direction for fix in plan.norm_fixes}

    def small(name: str, t: Tensor) -> Tensor:
        for dim in range(t.dim()):
            if (name, dim) in sliced.kept:
                t = t.index_select(dim, torch.from_numpy(sliced.kept[name, dim]).to(t.device))
        for rows, factor in factors.get(name, ()):
            t = t.clone()
            t[torch.from_numpy(rows).to(t.device)] *= _rowwise(factor, t)
        return t.to(dtype)

    def masked(name: str, t: Tensor) -> Tensor:
        t = t.to(dtype, copy=True)
        if name in left:
            t *= _rowwise(left[name], t)
        for dim in range(name in by_norm, t.dim()):  # a row without a norm has no direction; its gain is zero
            if (name, dim) in sliced.kept:
                gone = np.setdiff1d(np.arange(t.shape[dim]), sliced.kept[name, dim])
                t.index_fill_(dim, torch.from_numpy(gone).to(t.device), float(name.endswith("running_var")))
        return t

    try:
        for attempt in range(2):  # what is kept outside of the model is there the second time
            try:
                first = Recorder()
                got = _run(model, plan.shapes, sliced.attributes, small, inputs, first)
            except Incomparable:
                raise
            except Exception as error:
                _run(model, plan.shapes, {}, masked, inputs, Recorder())  # raises where the inputs are to blame
                raise SliceError(f"the sliced {type(model).__name__} would not run on real inputs: {error}") from error
            try:
                second = Masked(first.calls)
                want = _run(model, plan.shapes, {}, masked, inputs, second)
                second.end()
                return Proof(len(first.calls), _distance(got, want))
            except Different as error:
                if attempt:
                    raise SliceError(f"the sliced {type(model).__name__} computes something else: {error}") from None
    except Incomparable as reason:
        return Proof(len(first.calls), None, str(reason))
    except SliceError:
        raise
    except Exception as error:
        return Proof(0, None, f"the model would not run on these inputs: {error or type(error).__name__}")
    raise AssertionError


def _rowwise(factor: float | np.ndarray, t: Tensor) -> Tensor:
    """A factor of rows of ``t``, or one for each, to multiply them by."""
    return torch.as_tensor(factor, dtype=t.dtype, device=t.device).reshape(-1, *[1] * (t.dim() - 1))


def _real(tree: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Inputs with values, on the model's device: noise in place of those that have none."""
    generator = torch.Generator().manual_seed(0)

    def moved(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t.to(device, copy=True)
        values = torch.randn(t.shape, generator=generator, dtype=dtype) if t.is_meta else t
        return values.to(device, dtype, copy=True)

    return tree_map_only(Tensor, moved, tree)


def _distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest distance between two outputs, as a share of their norm."""
    if [x.shape for x in got] != [x.shape for x in want]:
        raise Different("outputs of other sizes")
    worst = 0.0
    for a, b in zip(got, want):
        if not b.is_floating_point() or not b.numel():
            continue
        if not torch.isfinite(b).all():
            raise Incomparable("the dense model's output isn't finite")
        apart, norm = float((a.double() - b.double()).norm()), float(b.double().norm())
        worst = max(worst, 0.0 if apart == 0 else apart / max(norm, 1e-12) if math.isfinite(apart) else math.inf)
    return worst


def _run(
    model: nn.Module, shapes: Any, attributes: Mapping[str, Any], cut: Cut, inputs: Sequence[Call], mode: Recorder
) -> list[Tensor]:
    """All outputs of the calls to a copy with these attributes, and what ``cut`` makes of the parameters."""
    out: list[Tensor] = []
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        twin = _twin(model, shapes, cut, mode).eval()
        stack.enter_context(attributes_set(twin, attributes))
        _same_positions(twin)
        torch.manual_seed(0)
        for method, args, kwargs in inputs:
            f = twin if method == "forward" else getattr(twin, method)
            args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
            with mode:
                result = f(*args, **kwargs)
            out += outputs_in(result)
    return out


def _twin(model: nn.Module, shapes: Any, cut: Cut, mode: Recorder) -> nn.Module:
    """A copy with what ``cut`` makes of every parameter and floating-point buffer, a large one when it is used; other
    tensors are the model's own. Whatever interrupts the proof, the model is as it was."""
    memo: dict[int, Any] = {}
    for name, _, _, t in tables(model):
        if id(t) not in memo:
            memo[id(t)] = mode.stand_in(name, t, cut) if t.is_floating_point() and name in shapes else t
    try:
        return copied(model, memo)
    except Exception as error:
        raise Incomparable(f"the model can't be copied: {error}") from error


def _same_positions(twin: nn.Module) -> None:
    """Tables of positions that a module would make anew for these inputs aren't masked."""

    def check(module: nn.Module, inputs: Any) -> None:
        rule = table_of(module)
        if rule is not None and rule.wanted(module, inputs) != rule.held(module):
            raise Incomparable("the model makes positions for inputs of another size")

    for module in twin.modules():
        if table_of(module) is not None:
            module.register_forward_pre_hook(check)
