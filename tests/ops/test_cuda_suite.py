"""The scripts around the GPU kernels: what they refuse, and what they make of a run's rows."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SUITE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
KERNELS = SUITE.parents[1] / "kernels" / "triton" / "channel_scores.py"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SUITE))
    return importlib.import_module(name)


def compiled_variants(change: str, choice: str) -> list[dict[str, Any]]:
    """What compile_ahead.py says of the variants v with ``choice``, for an NVIDIA and an AMD card, in a process without
    the interpreter. change: Python code that changes ``text``, the kernels' source, before they are compiled."""
    pytest.importorskip("triton")
    code = f"""
import compile_ahead as c, importlib.util, json, pathlib, sys, tempfile
name = "diffprune_fast.kernels.channel_scores"
text = pathlib.Path({str(KERNELS)!r}).read_text()
{change}
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "channel_scores.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import diffprune_fast.kernels
    diffprune_fast.kernels.channel_scores = module
    rows = [c.compile_one((v, t, None)) for v in c.variants(True) if {choice} for t in (c.TARGETS[1], c.TARGETS[3])]
print(json.dumps([row | {{"problem": c.problem(row)}} for row in rows]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{SUITE}:{SUITE.parents[1]}", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# fp32, unstacked, same memory order, with zero_grad
ZEROING = "v.get('dtype') == 'fp32' and v['zero_grad'] and v['same_order'] and not v['stacked']"


def test_a_triton_variant_compiles_for_nvidia_and_amd_without_spills() -> None:
    rows = compiled_variants("", ZEROING)
    assert [row["target"] for row in rows] == ["cuda:90", "hip:gfx942"]
    assert [row["problem"] for row in rows] == [None, None]


def test_zeroing_what_other_threads_have_yet_to_read_is_refused() -> None:
    rows = compiled_variants(
        'assert "tl.debug_barrier()" in text; text = text.replace("tl.debug_barrier()", "")', ZEROING
    )
    # one store in the branch of 16-byte accesses, one in the other
    assert [(row["zero_stores"], row["unordered_zeros"]) for row in rows] == [(2, 2), (2, 2)]
    assert all("without a barrier" in row["problem"] for row in rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 8}, "spills 8 bytes"),
        ({"vector_loads": 0}, "no 16-byte loads"),
        ({"zero_stores": 0}, "no store of zeros"),
        ({"unordered_zeros": 1}, "without a barrier"),
        ({}, None),
    ],
    ids=["spill", "narrow", "no zeros seen", "unordered zeros", "good"],
)
def test_triton_variants_are_refused(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, int], words: str | None
) -> None:
    variant = {"kernel": "pass_over_tensors", "same_order": True, "zero_grad": True}
    good: dict[str, Any] = {"spills": 0, "vector_loads": 4, "zero_stores": 2, "unordered_zeros": 0}
    found = load("compile_ahead", monkeypatch).problem({"variant": variant} | good | change)
    assert found is None if words is None else words in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 4}, "spills"),
        ({"local": 1}, "spills"),
        ({"per_unit": {1: 8, 2: 8, 8: 8, 16: 8}}, "no loop of 8 loads for units of 4 bytes"),
        ({"per_unit": {1: 8, 2: 8, 4: 12.5, 8: 8, 16: 8}}, "12.5 instructions for 4 bytes"),
    ],
    ids=["spill", "local memory", "no loop", "slow loop"],
)
def test_machine_code_is_refused(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str) -> None:
    check = load("check_machine_code", monkeypatch)
    good = {"spills": 0, "stack": 0, "local": 0, "per_unit": dict.fromkeys((1, 2, 4, 8, 16), 8.0)}
    assert check.problem(good) is None
    assert words in check.problem(good | change)


def test_instructions_are_counted_in_the_loop_that_moves_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["MOV R1, R2 ", *["LDG.E.U16.CONSTANT R4, desc[UR6][R4.64] "] * 8, *["IADD3 R5, R5, R6, RZ "] * 4]
    words += [*["STG.E.U16 desc[UR6][R8.64], R4 "] * 8, "@!P0 BRA 0x10 ", "EXIT "]
    code = [(16 * i, w) for i, w in enumerate(words)]
    assert load("check_machine_code", monkeypatch).per_unit(code) == {2: 21 / 8}


def test_the_report_says_which_aims_were_met(tmp_path: Path) -> None:
    labels = {"operation": "channel_scores", "model": "sd15", "dtype": "float32"}
    rows = [
        {**labels, "provider": "ours", "ms": 2.0, "of_copy": 0.5},
        {**labels, "provider": "ours, CUDA graph", "ms": 1.0, "of_copy": 0.9},
        {**labels, "provider": "reference", "ms": 10.0},
        {"operation": "slice_channels", "model": "sd15", "dtype": "float32", "provider": "ours", "problem": "E: no"},
    ]
    steps = tmp_path / "steps"
    steps.mkdir()
    (steps / "01.json").write_text(json.dumps({"step": "kernels", "about": {"device": "a card"}, "rows": rows}))
    subprocess.run([sys.executable, str(SUITE / "report.py"), str(steps), str(tmp_path)], check=True)
    text = (tmp_path / "results.md").read_text()
    assert "| channel_scores on sd15, kernels: of copy bandwidth | >= 0.85 | 0.9 | met |" in text
    assert "| channel_scores on sd15: times plain PyTorch | >= 10 | 5 | not met |" in text
    assert "| slice_channels on sd15: times Torch-Pruning | >= 50 | not measured |  |" in text
    assert "E: no" in text
    assert json.loads((tmp_path / "results.json").read_text())["steps"][0]["rows"] == rows


def test_a_rehearsal_claims_nothing(tmp_path: Path) -> None:
    row = {"operation": "channel_scores", "model": "sd15", "dtype": "float32", "provider": "ours", "of_copy": 0.9}
    (tmp_path / "01.json").write_text(json.dumps({"step": "k", "about": {}, "rehearsal": True, "rows": [row]}))
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run([sys.executable, str(SUITE / "report.py"), str(tmp_path), str(out)], check=True)
    text = (out / "results.md").read_text()
    assert "No figure means anything" in text
    assert "met |" not in text


def test_a_step_that_was_killed_while_it_wrote_is_a_row_of_the_report(tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    steps.mkdir()
    (steps / "01-kernels.json").write_text('{"step": "kernels", "rows": [{"ope')
    (steps / "02-more.json").write_text(json.dumps({"step": "more", "rows": [{"operation": "it ran"}]}))
    subprocess.run([sys.executable, str(SUITE / "report.py"), str(steps), str(tmp_path)], check=True)
    text = (tmp_path / "results.md").read_text()
    assert "the file is cut short" in text
    assert "it ran" in text


def test_the_report_is_there_before_the_last_step_ends(tmp_path: Path) -> None:
    if os.name == "nt":
        pytest.skip("a shell script")
    # its steps fail one after the other: an interpreter without PyTorch, which can still make the report
    environment = dict(os.environ)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    environment["PYTHON"] = str(python)
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", str(SUITE / "run.sh"), str(tmp_path / "out"), "--dry-run", "kernels", "profile"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 1
    assert "failed: kernels: failed (1)" in done.stdout
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.index("kernels: outcome") < text.index("profile: outcome")


def test_the_parameter_shapes_are_those_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(SUITE.parent))
    configs = importlib.import_module("unet_configs")
    known = json.loads((SUITE / "parameter_shapes.json").read_text())
    assert sorted(known) == ["cifar", "lsun", "sd15", "sdxl"]
    assert [tuple(shape) for shape in known["cifar"]] == configs.parameter_shapes("cifar")


def test_rows_of_ncu_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    csv = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","slice_channels_kernel(const GatherEntry *)","gpu__time_duration.sum","ns","1,250,000"
"0","slice_channels_kernel(const GatherEntry *)","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","81.5"
"1","add_to_units","gpu__time_duration.sum","us","7"
"""
    rows = load("profiled", monkeypatch).rows(csv)
    assert [row["provider"] for row in rows] == ["slice_channels_kernel", "add_to_units"]
    assert [row["microseconds"] for row in rows] == [1250, 7]
    assert rows[0]["dram"] == 81.5
    assert load("profiled", monkeypatch).rows("==ERROR== no permission") == []
