"""The keywords of ``score_and_prune``: completion, type checkers and the run itself know the same ones."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import diffprune_fast as dpf
from diffprune_fast.method import Options
from diffprune_fast.scoring.options import ScoreOptions
from diffprune_fast.selection.options import SelectOptions

ROOT = Path(__file__).parents[1]


def keywords(f: Any) -> dict[str, Any]:
    """Keyword-only parameters with their types; others may have types that only type checkers import."""
    parameters = inspect.signature(f).parameters.values()
    return {p.name: eval(p.annotation, inspect.unwrap(f).__globals__) for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize(("stage", "options"), [(dpf.score, ScoreOptions), (dpf.select, SelectOptions)])
def test_options_are_the_stages_keywords_with_their_types(stage: Any, options: Any) -> None:
    of_method = inspect.signature(dpf.score_and_prune).parameters
    handed_on = {n: hint for n, hint in keywords(stage).items() if n not in of_method}
    assert get_type_hints(options) == handed_on


def test_the_methods_own_keywords_have_the_stages_types() -> None:
    own = keywords(dpf.score_and_prune)
    for stage in (dpf.trace, dpf.score, dpf.select, dpf.prune):
        for name, hint in keywords(stage).items():
            assert own.get(name, hint) == hint, (stage.__name__, name)


def test_no_option_goes_to_two_stages() -> None:
    assert not get_type_hints(ScoreOptions).keys() & get_type_hints(SelectOptions).keys()
    assert get_type_hints(Options) == {**get_type_hints(ScoreOptions), **get_type_hints(SelectOptions)}


def test_a_misspelt_option_fails_at_run_time() -> None:
    with pytest.raises(TypeError, match="unknown option 'critereon': did you mean 'criterion'"):
        dpf.score_and_prune(None, None, critereon="magnitude")  # type: ignore[call-arg]


# Reading these takes mypy half a minute and says nothing of the options.
OTHERS = ["torch", "numpy", "scipy", "rich", "diffusers", "transformers", "accelerate", "huggingface_hub", "matplotlib"]
OTHERS += ["sklearn", "torchmetrics", "tqdm", "typer", "PIL", "jinja2", "triton", "peft", "onnx", "onnxruntime"]


def test_a_misspelt_or_mistyped_option_fails_in_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(
        "from diffprune_fast import score_and_prune\n"
        "score_and_prune(None, None, criterion='magnitude', round_to=4)\n"
        "score_and_prune(None, None, critereon='magnitude')\n"
        "score_and_prune(None, None, criterion='magnitud')\n"
    )
    config = tmp_path / "mypy.ini"
    config.write_text(
        "[mypy]\nfollow_imports = silent\nignore_missing_imports = true\n"
        f"[mypy-{','.join(f'{name}.*' for name in OTHERS)}]\nfollow_imports = skip\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-incremental", "--config-file", str(config), str(script)],
        env={**os.environ, "MYPYPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    lines = [line.split(":", 2) for line in done.stdout.splitlines() if ": error:" in line]
    assert [line[1] for line in lines] == ["3", "4"], done.stdout + done.stderr
    assert 'Unexpected keyword argument "critereon"' in lines[0][2]
    assert "incompatible type" in lines[1][2]
