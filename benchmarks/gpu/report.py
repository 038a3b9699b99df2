"""Put the steps' files together: ``results.json`` and ``results.md`` in the folder given. Made anew after every step.

python benchmarks/gpu/report.py STEPS_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

Row = dict[str, Any]


def find(rows: Iterable[Row], **labels: Any) -> Row | None:
    """The first row with these labels that was measured."""
    for row in rows:
        if "problem" not in row and all(row.get(k) == v for k, v in labels.items()):
            return row
    return None


def ratio(rows: list[Row], model: str, dtype: str, operation: str, other: str) -> float | None:
    """How many times faster ours is."""
    labels = {"operation": operation, "model": model, "dtype": dtype}
    ours, theirs = find(rows, **labels, provider="ours"), find(rows, **labels, provider=other)
    return theirs["ms"] / ours["ms"] if ours and theirs else None


def field(name: str, **labels: Any) -> Callable[[list[Row]], float | None]:
    def get(rows: list[Row]) -> float | None:
        row = find(rows, **labels)
        return None if row is None else row.get(name)

    return get


def goals() -> list[tuple[str, str, float, Callable[[list[Row]], float | None]]]:
    """What is aimed at on an H200: words, comparison, value, where it stands in the rows."""
    out: list[tuple[str, str, float, Callable[[list[Row]], float | None]]] = []
    for model, dtype in (("sd15", "float32"), ("sdxl", "bfloat16")):
        scores = {"operation": "channel_scores", "model": model, "dtype": dtype}
        slices = {"operation": "slice_channels", "model": model, "dtype": dtype}
        out += [
            (
                f"channel_scores on {model}, kernels: of copy bandwidth",
                ">=",
                0.85,
                field("of_copy", **scores, provider="ours, CUDA graph"),
            ),
            (
                f"channel_scores on {model}: times plain PyTorch",
                ">=",
                10,
                lambda rows, m=model, d=dtype: ratio(rows, m, d, "channel_scores", "reference"),
            ),
            (
                f"slice_channels on {model}, kernel: of copy bandwidth",
                ">=",
                0.70,
                field("of_copy", **slices, provider="ours, kernel alone"),
            ),
            (
                f"slice_channels on {model}: times Torch-Pruning",
                ">=",
                50,
                lambda rows, m=model, d=dtype: ratio(rows, m, d, "slice_channels", "torch_pruning"),
            ),
        ]
    step = {"operation": "scoring step", "model": "cifar", "provider": "with scores"}
    out.append(("share of a scoring step", "<=", 0.03, field("share", **step, dtype="tf32")))
    for model, wanted in (("cifar", 15), ("lsun", 30)):
        whole = {"operation": "score_and_prune", "model": model, "dtype": "tf32", "provider": "ours"}
        out.append((f"score_and_prune on {model}: times 1000 passes", ">=", wanted, field("ratio_of_1000", **whole)))
        out.append((f"score_and_prune on {model}: times 490 passes", ">=", wanted, field("ratio_of_490", **whole)))
        call = {"operation": "model call", "model": model, "dtype": "bf16", "provider": "pruned, rounded to 8"}
        out.append((f"{model} at half its MACs: times images per second", ">=", 1.6, field("ratio", **call)))
    return out


def goal_table(rows: list[Row]) -> list[str]:
    lines = ["| Aim | Wanted | Measured | |", "|---|---|---|---|"]
    for words, sign, wanted, get in goals():
        value = get(rows)
        met = "" if value is None else "met" if (value >= wanted if sign == ">=" else value <= wanted) else "not met"
        lines.append(f"| {words} | {sign} {wanted:g} | {'not measured' if value is None else f'{value:.3g}'} | {met} |")
    return lines


COLUMNS = {
    "ms": "ms", "p20": "p20", "p80": "p80", "gb_s": "GB/s", "of_copy": "of copy", "error": "error",
    "extra_mb": "extra MB", "share": "share", "ratio": "ratio", "images_per_s": "images/s", "macs": "MACs left",
    "pass_s": "s per pass", "seconds": "seconds", "first_call_s": "first call s", "samples": "samples",
    "agreement": "agreement", "peak_gb": "peak GB", "ratio_of_1000": "x 1000 passes", "ratio_of_490": "x 490 passes",
    "batch": "batch", "micro_batch": "micro-batch", "params_left": "params left", "outcome": "outcome",
    "calls": "calls", "layers": "layers", "estimated_mb": "estimated MB", "microseconds": "us", "dram": "DRAM %",
    "occupancy": "occupancy %", "issue": "issue %", "waits_memory": "waits: memory", "waits_barrier": "waits: barrier",
    "waits_queue": "waits: queue", "waits_pipe": "waits: pipe", "clocks": "clocks", "problem": "problem",
}  # fmt: skip


def step_table(rows: list[Row]) -> list[str]:
    used = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    names = [n for n in ("operation", "model", "dtype", "provider") if any(n in row for row in rows)]
    lines = ["| " + " | ".join([*names, *(COLUMNS[c] for c in used)]) + " |", "|" + "---|" * (len(names) + len(used))]
    for row in rows:
        cells = [cell(row.get(n)) for n in (*names, *used)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cell(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def commit() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    carried = ROOT / "benchmarks" / "gpu" / "wheels" / "commit"  # by pack.sh, as the history isn't
    return done.stdout.strip() or (carried.read_text().strip() if carried.is_file() else "unknown")


def read(paths: Iterable[Path]) -> Iterable[dict[str, Any]]:
    """The steps that can be read: a step that was killed may have left half a file."""
    for path in paths:
        try:
            yield json.loads(path.read_text())
        except json.JSONDecodeError:
            yield {"step": path.stem, "rows": [{"operation": path.stem, "problem": "the file is cut short"}]}


def main() -> None:
    steps_folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    steps = list(read(sorted(steps_folder.glob("*.json"))))
    rows = [row for step in steps for row in step["rows"]]
    rehearsal = any(step.get("rehearsal") for step in steps)
    about = next((s["about"] for s in steps if "device" in s.get("about", {})), {}) | {"commit": commit()}
    (out / "results.json").write_text(json.dumps({"about": about, "rehearsal": rehearsal, "steps": steps}, indent=1))
    lines = ["# GPU results", "", ", ".join(f"{k} {v}" for k, v in about.items()), ""]
    if rehearsal:
        lines += [
            "**A rehearsal on the CPU at tiny sizes: it shows that the suite runs. No figure means anything.**",
            "",
        ]
    lines += ["## Aims", "", *goal_table([] if rehearsal else rows), ""]
    for step in steps:
        lines += [f"## {step['step']}", "", *step_table(step["rows"]), ""]
    (out / "results.md").write_text("\n".join(lines))
    print("\n".join(lines[: 8 + len(goals())]))


if __name__ == "__main__":
    main()
