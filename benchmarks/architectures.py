"""Every architecture of the zoo: traced, pruned at random, compared with the masked dense model.

    python benchmarks/architectures.py [name ...] [--ratio 0.3] [--seeds 1] [--tracebacks]
    python benchmarks/architectures.py --write docs/architectures.md
    python benchmarks/architectures.py --check docs/architectures.md

``--check`` fails if the document would be another one now (times to trace aside).
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import diffprune_fast as dpf
from diffprune_fast.plan.lattice import lattice

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from models import CASES, Case
from oracle import random_keep, randomised
from oracle_zoo import EXACT, compare
from zoo import MORE, TRANSFORMERS, ZOO


@dataclass
class Row:
    """What is known of one architecture. error: of the output's scale, the worst of all runs."""

    name: str
    params: int = 0
    groups: int = 0
    share: float = math.nan
    dims: float = math.nan
    left: float = math.nan
    trace_seconds: float = math.nan
    error: float = math.nan
    problem: str = ""
    log: str = ""
    whole: Counter[str] = field(default_factory=Counter)
    frozen: Counter[str] = field(default_factory=Counter)

    @property
    def exact(self) -> bool:
        return not self.problem and self.error <= EXACT


# Classes of diffusers 0.42 without a row.
WITHOUT = (
    "Classes of diffusers 0.42 without a row: 10 that have no forward of their own or only hold others "
    "(ControlNetXSAdapter, FluxMultiControlNetModel, HunyuanDiT2DMultiControlNetModel, LegacyModelMixin, "
    "MotionAdapter, MultiAdapter, MultiControlNetModel, MultiControlNetUnionModel, "
    "QwenImageMultiControlNetModel, SD3MultiControlNetModel), and 46 for which there is no small config "
    "yet (AnimaTextConditioner, AnyFlowFARTransformer3DModel, AutoencoderKLAllegro, "
    "AutoencoderKLHunyuanImageRefiner, AutoencoderKLHunyuanVideo15, AutoencoderKLKVAEAudio, "
    "AutoencoderKLKVAEVideo, AutoencoderKLMiniMaxH3, AutoencoderKLMiniMaxH3Audio, "
    "AutoencoderKLQwenImage21, AutoencoderOobleck, AutoencoderRAE, AutoencoderSAME, AutoencoderVidTok, "
    "BriaFibo2Transformer2DModel, ConsistencyDecoderVAE, Cosmos3AVAEAudioTokenizer, "
    "Cosmos3OmniTransformer, CosmosControlNetModel, DreamLiteTransformer2DModel, Flux3Transformer2DModel, "
    "HeliosTransformer3DModel, HunyuanDiT2DControlNetModel, Ideogram4Transformer2DModel, "
    "JoyImageEditPlusTransformer3DModel, Kandinsky6SRLatentUpscalerBank, Kandinsky6SRTransformer3DModel, "
    "Kandinsky6SRVAE, Kandinsky6Transformer3DModel, LTX2VideoDiffusionDecoderModel, LongCatAudioDiTVae, "
    "MMAudioVAE, MMAudioVocoder, MiniMaxH3Transformer3DModel, MiniMaxMusic3ConditionEncoder, "
    "MiniMaxMusic3RVQDepthDecoder, MiniMaxMusic3Transformer1DModel, MiniMaxMusic3Vocoder, "
    "RFD4ProteinaAutoencoder, RFD4ProteinaTransformer, SanaWMLTX2RefinerTransformer3DModel, "
    "SanaWMTransformer3DModel, SparseControlNetModel, WanAnimate2Transformer3DModel, "
    "WanAnimateTransformer3DModel, ZImageControlNetModel)."
)

HELD = "equal counts in every row (head) let no unit go"


def members(plan: dpf.Plan) -> list[dpf.tracing.Member]:
    """The places of all groups that constraints let any unit go from."""
    of = lattice(plan, "count")
    return [m for g, c in zip(plan.groups, of.cluster.tolist()) if len(of.allowed[c]) > 1 for m in g.members]


def prunable(plan: dpf.Plan) -> set[str]:
    """Parameters that at least one group's removal makes smaller."""
    return {m.parameter for m in members(plan)} - plan.buffers


def prunable_dims(plan: dpf.Plan) -> float:
    """The share of the parameters' two channel dims that can be made smaller (a weight with one of two counts half)."""
    places = {(m.parameter, m.dim) for m in members(plan)}
    total = some = 0.0
    for name, shape in plan.shapes.items():
        dims = [d for d in range(min(len(shape), 2)) if shape[d] > 1]
        if name not in plan.buffers and dims:
            total += math.prod(shape)
            some += math.prod(shape) * sum((name, d) in places for d in dims) / len(dims)
    return some / total


def reason_of(text: str) -> str:
    """A reason without the place, so that the same ones count together."""
    return re.sub(r"(in|of|by|over) \S+ \((\w+)\)", r"\1 \2", text)


def _frozen_reasons(plan: dpf.Plan, row: Row) -> None:
    """By parameters, for tensors that stay whole; by places, for all."""
    small = prunable(plan)
    total = plan.params()
    held = {m.place for g in plan.groups for m in g.members} - {m.place for m in members(plan)}
    for place, reason in [*plan.frozen.items(), *[(place, HELD) for place in sorted(held)]]:
        name = place.rpartition(":")[0]
        if name in plan.buffers:
            continue
        row.frozen[reason_of(reason)] += 1
        if name not in small:
            dims = sum(n > 1 for n in plan.shapes[name])
            row.whole[reason_of(reason)] += int(np.prod(plan.shapes[name])) / max(dims, 1) / total


def describe(row: Row, plan: dpf.Plan, ratio: float) -> None:
    """Fill in what the table says of a plan."""
    row.groups = len(plan.groups)
    small = prunable(plan)
    row.share = sum(int(np.prod(plan.shapes[n])) for n in small) / plan.params()
    row.dims = prunable_dims(plan)
    _frozen_reasons(plan, row)
    if not plan.groups:
        raise AssertionError("no group can be pruned")
    row.left = plan.params(random_keep(plan, ratio, 0, "count")) / plan.params()
    row.error = 0.0


def measure(case: Case, ratio: float, seeds: int, oracle: bool) -> Row:
    row = Row(case.name)
    try:
        torch.manual_seed(0)
        model = randomised(case.make(), 0)
        row.params = sum(p.numel() for p in model.parameters())
        if oracle:
            dpf.trace(model, case.example_inputs)  # the first one imports and caches
        started = time.perf_counter()
        plan = dpf.trace(model, case.example_inputs)
        row.trace_seconds = time.perf_counter() - started
        describe(row, plan, ratio)
        for run in ("exact", "uneven", "count", "heads") if oracle else ():
            units = plan if run != "heads" else dpf.trace(model, case.example_inputs, units="heads")
            for seed in range(seeds):
                error, _ = compare(case, model, units, ratio, seed, run)
                row.error = max(row.error, error) if not math.isnan(error) else math.inf
        if not row.exact:
            row.problem = f"not exact: {row.error:.1e}"
    except Exception as error:
        row.problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        row.log = traceback.format_exc()
    return row


def _percent(x: float) -> str:
    return "-" if math.isnan(x) else f"{100 * x:.0f} %"


def reasons(row: Row, n: int = 2) -> str:
    """Why parameters stay whole, with their share; else why dims of prunable ones stay."""
    named = [f"{r} ({100 * s:.0f} %)" for r, s in row.whole.most_common(n) if s >= 0.005]
    return "; ".join(named) or "; ".join([f"{r} ({k} dims)" for r, k in row.frozen.most_common(n)])


def printed(row: Row) -> str:
    error = "-" if math.isnan(row.error) else f"{row.error:.0e}"
    return (
        f"{row.name:41} {row.params / 1e6:5.2f}M {row.groups:4} {_percent(row.share):>6} {_percent(row.dims):>6} "
        f"{_percent(row.left):>6} {row.trace_seconds:6.2f}s {error:>6}  {row.problem[:150] or reasons(row)[:150]}"
    )


def document(rows: list[Row], others: list[Row], ratio: float) -> str:
    """docs/architectures.md; ``others``: those of the library transformers."""
    every = [*rows, *others]
    lines = [
        "# Architectures",
        "",
        "Written by `python benchmarks/architectures.py --write docs/architectures.md` from the tiny random configs in "
        "`tests/models.py` and `tests/zoo*.py`.",
        "",
        f"{sum(r.exact for r in every)} of {len(every)} prune exactly: traced, a random keep-set removed at ratio "
        f'{ratio:g} with `norm_groups="exact"` and `"count"`, and the outputs compared in float64 with those of the '
        "masked dense model "
        f"(removed channels zeroed, norms over the kept channels): they agree to {EXACT:.0e} of their scale; and so "
        'they do when whole heads go (`units="heads"`). The tables are of `units="auto"`. '
        "*Prunable*: the share of the parameters that at least one group makes smaller, of those that constraints let "
        "go. *Dims*: the same by channel dimensions (a weight of whose two only one can be pruned counts half). "
        '*Left*: the share of parameters that is left at that ratio (`"count"`). Seconds and memory for models of full '
        "size (SDXL, SD3, Flux): [full_size_traces](../benchmarks/results/full_size_traces.md).",
        *_section("Models of diffusers, and plain modules", rows),
        "",
        WITHOUT,
        *_section("Models of transformers", others),
    ]
    return "\n".join(lines) + "\n"


def _section(title: str, rows: list[Row]) -> list[str]:
    """A heading, the table of what is exact, and that of what isn't."""
    lines = [
        "",
        f"## {title}",
        "",
        "| Architecture | Groups | Prunable | Dims | Left | Seconds to trace | What stays, and why |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [line_of(r) for r in rows if r.exact]
    rest = [r for r in rows if not r.exact]
    if rest:
        lines += ["", "Refused before anything changes:", "", "| Architecture | Why |", "| --- | --- |"]
        lines += [f"| {r.name} | {_cell(r.problem)} |" for r in rest]
    return lines


def line_of(r: Row) -> str:
    return (
        f"| {r.name} | {r.groups} | {_percent(r.share)} | {_percent(r.dims)} | {_percent(r.left)} "
        f"| {r.trace_seconds:.2f} | {_cell(reasons(r))} |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|") or "-"


def without_times(text: str) -> str:
    return re.sub(r"\| \d+\.\d\d \|", "| |", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only cases whose names contain one of these")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--seeds", type=int, default=1, help="random keep-sets per case and mode")
    parser.add_argument("--tracebacks", action="store_true")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--check", type=Path, help="compare with this file; the oracle doesn't run, the tests have it")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # deprecations inside diffusers are not what is measured here
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    print(f"{'':41} {'size':>6} {'grps':>4} {'prun.':>6} {'dims':>6} {'left':>6} {'trace':>7} {'error':>6}")
    for case in [*CASES, *ZOO, *MORE, *TRANSFORMERS]:
        if not args.names or any(n in case.name for n in args.names):
            rows.append(measure(case, args.ratio, args.seeds, oracle=not args.check))
            print(printed(rows[-1]), flush=True)
            if args.tracebacks and rows[-1].log:
                print(rows[-1].log)
    print(f"{sum(r.exact for r in rows)} of {len(rows)} exact")
    theirs = {case.name for case in TRANSFORMERS}
    text = document([r for r in rows if r.name not in theirs], [r for r in rows if r.name in theirs], args.ratio)
    if args.write:
        args.write.write_text(text)
    if args.check and without_times(args.check.read_text()) != without_times(text):
        print(f"{args.check} is not what would be written now: run with --write {args.check}")
        return 1
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
