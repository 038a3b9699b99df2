"""Names on the hub where commands take folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hub_cache import Hub, stand_in
from PIL import Image
from typer.testing import CliRunner

from diffprune_fast import from_pretrained
from diffprune_fast.cli import app

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    torch.manual_seed(0)
    model = UNet2DModel(**TINY)
    model.save_pretrained(tmp_path / "model")
    DDPMScheduler(prediction_type="sample").save_pretrained(tmp_path / "model" / "scheduler")
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return stand_in(monkeypatch, tmp_path / "cache", model=tmp_path / "model", pipeline=tmp_path / "pipeline")


def run(*arguments: Any, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done


PRUNE = ("--criterion", "magnitude", "--no-rotate", "--round-to", 4)


@pytest.mark.parametrize("name", ["user/model", "user/pipeline", "user/pipeline@v1"])
@pytest.mark.parametrize("command", ["trace", "inspect"])
def test_a_repository_is_traced_as_its_folder_is(hub: Hub, command: str, name: str) -> None:
    folder = name.removeprefix("user/").removesuffix("@v1")
    assert run(command, name).stdout == run(command, folder).stdout
    assert {revision for _, revision in hub.asked} == {"v1" if "@" in name else None}


def test_a_repository_is_pruned_and_finetuned_towards_itself(hub: Hub) -> None:
    run("prune", "user/model", *PRUNE, "--out", "pruned")
    assert json.loads(Path("pruned/run.json").read_text())["command"].startswith("diffprune-fast prune user/model ")
    common = ("--images", "images", "--steps", 1, "--batch-size", 4, "--teacher", "user/model", "--out", "recovered")
    run("finetune", "pruned", *common)
    assert from_pretrained("recovered").num_parameters() < UNet2DModel(**TINY).num_parameters()
    assert not Path("user").exists()


def test_the_scheduler_of_a_repository_is_the_one_it_was_trained_with(hub: Hub) -> None:
    run("prune", "user/model", *PRUNE, "--out", "pruned")
    assert DDPMScheduler.from_pretrained("pruned").config.prediction_type == "sample"


def test_a_repository_is_sampled_and_evaluated_beside_another(hub: Hub) -> None:
    run("sample", "user/pipeline", "--n", 2, "--steps", 1, "--out", "samples")
    assert len(list(Path("samples").glob("0*.png"))) == 2
    common = ("--images", "images", "--n", 2, "--steps", 1, "--seeds", 1, "--held-out", 4, "--batch-sizes", 1)
    run("evaluate", "user/model", "--dense", "user/model", *common, "--out", "found")
    found = json.loads(Path("found/evaluation.json").read_text())
    assert found["name"] == "model"
    assert found["figures"]["MSE"]["mean"] == 0


def test_a_run_begins_with_a_repository(hub: Hub) -> None:
    settings: dict[str, Any] = {"model": "user/model", "images": "images", "out": "out", "device": "cpu"}
    settings["prune"] = {"criterion": "magnitude", "round_to": 4, "no_compensate": True, "no_rotate": True}
    settings["evaluate"] = {"n": 2, "steps": 1, "seeds": 1, "held_out": 4, "batch_sizes": "1"}
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    run("run", "run.yaml")
    assert "Kept channels" in Path("out/report.html").read_text()


@pytest.mark.parametrize("command", ["trace", "inspect", "prune", "finetune", "sample", "evaluate"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("user/other", "there is no folder user/other, and the hub doesn't give a repository of that name (the hub"),
        ("nowhere/at/all", "nowhere/at/all is neither a folder nor the name of a repository on the hub (user/repo)"),
    ],
)
def test_what_is_neither_a_folder_nor_a_repository_is_one_line(hub: Hub, command: str, name: str, says: str) -> None:
    needed = {"finetune": ("--images", "images", "--steps", 1), "evaluate": ("--images", "images")}
    out = () if command in ("trace", "inspect") else ("--out", "out")
    lines = run(command, name, *needed.get(command, ()), *out, code=2).stderr.strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert says in lines[-1]
    assert not Path("out").exists()
