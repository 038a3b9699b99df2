"""What compensation will take, in seconds and bytes, and which form it therefore takes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..choices import CompensationMode
from ..objective.loss_run import sum_dtype
from ..objective.ranks import rank_and_count, reduced
from ..plan.plan import Keep, Plan
from .calibration import Calibration
from .consumers import Consumer
from .live_bytes import live_bytes
from .patches import CHUNK_BYTES, channel_dim, positions_of
from .record import watched

Form = Literal["full", "channels", "gradients"]
# "auto" takes what is worth most while it is estimated to stay below this, or below so many times what mixed channels
# take (the models' own forwards may be what takes long).
AUTO_SECONDS, WORTH = 600.0, 2.0
MAX_ROWS = 16384
# Rows for every column of a wide layer: with half a row for a column the digits' loss was .041 in place of .034.
ROWS_PER_COLUMN = 4
# What one matrix, or all targets on the host, may take of the memory that is free.
SHARE = 0.5
# Activations that live at a time, of the outputs of all layers together: .07 to .27 on six models, four UNets of
# 16x16 to 32x32, a DiT and a small model of Stable Diffusion's build. For a plan alone; otherwise they are measured.
LIVE_SHARE = 0.25


@dataclass(frozen=True)
class Work:
    """What one layer's solution takes. places: positions of its output, for all samples together; inner: of its input.

    groups, columns, outputs: as in :class:`~.least_squares.Problem`. taps: kernel positions. dense: the inputs that the
    dense layer has. itemsize: bytes of one number.
    """

    name: str
    places: int
    inner: int
    groups: int
    columns: int
    outputs: int
    taps: int
    dense: int
    itemsize: int

    @property
    def mixable(self) -> bool:
        """Whether a mixing of channels, the same for all kernel positions, is a cheaper thing."""
        return self.groups == 1 and self.taps > 1

    def rows(self, form: Form) -> int:
        columns = self.columns // self.taps if form == "channels" else self.columns
        return max(MAX_ROWS, ROWS_PER_COLUMN * columns)

    def operations(self, form: Form) -> float:
        """Multiply-accumulates."""
        if form == "channels":
            columns, outputs, rows = self.columns // self.taps, self.dense, min(self.inner, self.rows(form))
        else:
            columns, outputs, rows = self.columns, self.outputs, min(self.places, self.rows(form))
        if form == "gradients":
            return self.groups * rows * columns * outputs * 23.0
        products = rows * columns * (columns + 2 * outputs)
        return self.groups * float(products + columns**3 / 3 + columns**2 * outputs)

    def matrix_bytes(self, form: Form) -> int:
        """The matrix with its factor; in double precision up to a width, see ``least_squares``."""
        if form == "gradients":
            return 4 * self.groups * self.columns * self.outputs * self.itemsize
        columns = self.columns // self.taps if form == "channels" else self.columns
        return self.groups * columns**2 * (8 if columns > 8000 else 20)

    def target_bytes(self, form: Form) -> int:
        if form == "channels":
            return min(self.inner, self.rows(form)) * self.dense * self.itemsize
        return min(self.places, self.rows(form)) * self.outputs * self.groups * self.itemsize


@dataclass(frozen=True)
class Estimate:
    """mode: ``"full"`` or ``"channels"``; why: what decided. forms: per layer. seconds, bytes: what it will take, the
    models' forwards of all inputs at once among it. half: targets have to be kept in half precision."""

    mode: str
    why: str
    forms: Mapping[str, Form]
    rows: Mapping[str, int]
    seconds: float
    bytes: int
    half: bool = False

    def __str__(self) -> str:
        return f"compensation {self.mode} ({self.why}): about {self.seconds:.0f} s and {self.bytes / 1e9:.2g} GB"


def measured(
    dense: nn.Module, pruned: nn.Module, layers: Sequence[Consumer], calibration: Calibration
) -> tuple[list[Work], float, float]:
    """What every layer will take, from a forward of one sample; and the seconds and bytes of a forward of all."""
    after = dict(pruned.named_modules())
    found: list[Work] = []

    def see(layer: Consumer, module: Any, x: Tensor, y: Tensor) -> None:
        n, places = calibration.samples, 1
        for size in positions_of(module, x):
            places *= size
        inner = n * x.numel() // x.shape[channel_dim(module)]
        before = module.weight.shape[-1 if module.weight.ndim == 1 else 1]
        found.append(_work(layer.name, after[layer.name], n * places, inner, before))

    begin = time.perf_counter()
    with watched(dense, layers, see):
        calibration.one(dense)
    seconds = (time.perf_counter() - begin) * calibration.samples
    live = live_bytes(lambda: calibration.one(dense)) * (calibration.stop - calibration.start)
    return found, seconds, float(live)


def _work(name: str, module: Any, places: int, inner: int, dense: int) -> Work:
    weight = module.weight
    size = max(4, weight.element_size())
    if weight.ndim == 1:
        return Work(name, places, inner, 1, 1, len(weight), 1, dense, size)
    taps, groups = weight[0, 0].numel(), getattr(module, "groups", 1)
    return Work(name, places, inner, groups, weight.shape[1] * taps, weight.shape[0] // groups, taps, dense, size)


def estimate(
    plan: Plan,
    keep: Keep | np.ndarray,
    *,
    mode: CompensationMode = "auto",
    samples: int = 128,
    device: torch.device | str = "cpu",
) -> Estimate:
    """What :func:`compensate` would take for a keep-set, before anything is pruned: by arithmetic on the plan.

    keep: group name to kept units, or ``(n_groups,)`` kept counts per group. device: where the models would be; the
    speed of its matrix products is timed, which takes milliseconds.
    """
    device = torch.device(device)
    counts = plan.counts(keep)
    lost: dict[tuple[str, int], int] = {}
    for group, n in zip(plan.groups, counts.tolist()):
        for m in group.members:
            place = (m.parameter, m.dim)
            lost[place] = lost.get(place, 0) + (group.n_units - n) * m.index.shape[1]
    sizes = plan.extents.at(plan.counts())
    works: dict[str, Work] = {}
    for cost in plan.costs:
        path = cost.place.partition(" ")[0]
        name = f"{path}.weight"
        if cost.attention or path in works or not lost.get((name, 1)) or len(plan.shapes.get(name, ())) < 2:
            continue
        out, channels, *kernel = plan.shapes[name]
        taps = int(np.prod(kernel, dtype=np.int64))
        places = samples * round(cost.scale * float(np.prod(sizes[list(cost.extents)])) / (out * channels * taps))
        columns = (channels - lost[name, 1]) * taps
        works[path] = Work(path, places, places, 1, columns, out - lost.get((name, 0), 0), taps, channels, 4)
    means = means_of(device)
    forward = samples * (plan.macs() + plan.macs(counts)) / 2 / means.rate
    return decided(list(works.values()), mode, means, forward, _live_share(plan, samples))


def _live_share(plan: Plan, samples: int) -> float:
    """Bytes of the activations that live at a time, by rule of thumb, in single precision."""
    sizes, total = plan.extents.at(plan.counts()), 0.0
    for cost in plan.costs:
        shape = plan.shapes.get(f"{cost.place.partition(' ')[0]}.weight", ())
        if not cost.attention and len(shape) > 1:
            total += cost.scale * float(np.prod(sizes[list(cost.extents)])) / float(np.prod(shape[1:]))
    return LIVE_SHARE * 4 * samples * total


@dataclass(frozen=True)
class Means:
    """What there is to work with: multiply-accumulates a second, bytes for a layer's matrix, bytes for all targets."""

    rate: float
    room: float
    host: float


def means_of(device: torch.device) -> Means:
    return Means(throughput(device), SHARE * free_bytes(device), SHARE * free_bytes(torch.device("cpu")))


def agreed(means: Means, forward: float, device: torch.device) -> tuple[Means, float]:
    """The least that any rank has, so that all decide alike."""
    if rank_and_count()[1] == 1:
        return means, forward
    least = torch.tensor([means.rate, means.room, means.host, forward], dtype=sum_dtype(device), device=device)
    reduced(least, "MIN")
    rate, room, host, forward = least.tolist()
    return Means(rate, room, host), forward


def decided(works: Sequence[Work], mode: CompensationMode, means: Means, forward: float, live: float) -> Estimate:
    """The form of every layer. forward: seconds of a forward of all samples. live: bytes of its activations."""

    def formed(mode: str) -> tuple[dict[str, Form], float]:
        forms = {w.name: _form(w, mode, means.room) for w in works}
        return forms, sum(w.operations(forms[w.name]) for w in works) / means.rate + 2 * forward

    forms, seconds = formed("channels" if mode == "channels" else "full")
    chosen, why = mode, "asked for"
    if mode == "auto":
        chosen, why = "full", f"about {seconds:.0f} s"
        cheaper, less = formed("channels")
        if seconds > max(AUTO_SECONDS, WORTH * less):
            chosen, why = "channels", f"full would take about {seconds:.0f} s"
            forms, seconds = cheaper, less
    if "gradients" in forms.values():
        wide = [n for n, f in forms.items() if f == "gradients"]
        why += f"; {len(wide)} layers by conjugate gradients, their matrices don't fit"
    targets = sum(w.target_bytes(forms[w.name]) for w in works)
    largest = max((w.matrix_bytes(forms[w.name]) for w in works), default=0)
    half = targets > means.host
    rows = {w.name: w.rows(forms[w.name]) for w in works}
    total = (targets // 2 if half else targets) + largest + 3 * CHUNK_BYTES + round(live)
    return Estimate(chosen, why, forms, rows, seconds, total, half)


def _form(work: Work, mode: str, room: float) -> Form:
    if mode == "channels" and work.mixable:
        return "channels"
    return "gradients" if work.matrix_bytes("full") > room else "full"


def throughput(device: torch.device) -> float:
    """Multiply-accumulates a second of a matrix product in the precision that the device would take, timed here."""
    gpu = device.type == "cuda"
    n = 4096 if gpu else 384
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    best = float("inf")
    for _ in range(4):
        _synchronise(device)
        begin = time.perf_counter()
        a @ a
        _synchronise(device)
        best = min(best, time.perf_counter() - begin)
    return n**3 / max(best, 1e-9)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; where nobody says so, eight gigabytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (OSError, ValueError, AttributeError):
        return 8 << 30
