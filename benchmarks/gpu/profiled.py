"""Nsight Compute on the four kernels: share of the memory's bandwidth, occupancy, issue, and what warps wait for.

Runs itself under ncu (``--part inner`` is what it runs) and makes a row of every kernel. Where there is no ncu, or it
may not read the counters, the row says so.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from typing import Any

import gpu_timing
import torch
from gpu_timing import Step
from whole_tables import score_table, shapes_of, slices_of, tensors

from diffprune_fast import ops

KERNELS = "pass_over_tensors|sum_partials|add_to_units|slice_channels"
METRICS = {
    "gpu__time_duration.sum": "microseconds",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "waits_memory",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "waits_barrier",
    "smsp__average_warps_issue_stalled_lg_throttle_per_issue_active.ratio": "waits_queue",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio": "waits_pipe",
}
MOST_LAUNCHES = 40


def inner(step: Step) -> None:
    """Both operations, once to warm up and once to be looked at."""
    for model, dtype in (("sd15", torch.float32), ("sdxl", torch.bfloat16)):
        shapes = shapes_of(step, model)
        thetas, grads = tensors(shapes, dtype, step.device), tensors(shapes, dtype, step.device)
        table = score_table(shapes)
        scores = torch.zeros(table.n_units, dtype=torch.float64, device=step.device)
        for _ in range(2):
            ops.channel_scores_(scores, thetas, grads, table)
        del grads
        ops.slice_channels_(thetas, slices_of(shapes))
        step.synchronize()
        step.row(operation="profiled", model=model, dtype=str(dtype)[6:], provider="ran")


def rows(text: str) -> list[dict[str, Any]]:
    """One per launch, of ncu's --csv output."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    found: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(io.StringIO("\n".join(lines[begin:]))):
        row = found.setdefault(line["ID"], {"operation": "profiled", "provider": line["Kernel Name"].split("(")[0]})
        name = METRICS.get(line.get("Metric Name", ""))
        if name:
            value = float(line["Metric Value"].replace(",", ""))
            scale = {"ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}.get(line.get("Metric Unit", ""), 1.0)
            row[name] = value * scale if name == "microseconds" else value
    return list(found.values())


def main() -> None:
    step = Step("profile", __doc__.splitlines()[0])
    if step.part == "inner":
        inner(step)
        return
    own = [sys.executable, __file__, "--part", "inner", "--json", f"{step.path}.inner"]
    if step.rehearsal:
        own.append("--dry-run")
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None or step.rehearsal:
        done = subprocess.run(own, capture_output=True, text=True)
        problem = "ncu is not on PATH" if done.returncode == 0 else f"failed: {done.stderr[-300:]}"
        step.failed(operation="profiled", problem=problem)
        return
    command = [ncu, "--csv", "--clock-control", "none", "-k", f"regex:{KERNELS}", "-c", str(MOST_LAUNCHES)]
    done = subprocess.run([*command, "--metrics", ",".join(METRICS), *own], capture_output=True, text=True)
    for row in rows(done.stdout):
        step.row(**row)
    if not step.rows:
        step.failed(operation="profiled", problem=f"ncu: {(done.stdout + done.stderr)[-300:]}")


if __name__ == "__main__":
    assert gpu_timing.ROOT.is_dir()
    with torch.no_grad():
        main()
