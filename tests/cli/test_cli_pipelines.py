"""The commands on a whole pipeline: captions from a file, samples of prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import made
from typer.testing import CliRunner

from diffprune_fast.cli import app
from diffprune_fast.pipelines import pipeline_from_pretrained


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    made("stable_diffusion").save_pretrained(folder / "pipeline")
    (folder / "images").mkdir()
    rng, lines = np.random.default_rng(0), []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "a red cat"}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "prompts.txt").write_text("a red cat\n\na small house\n")
    return folder


def test_a_pipelines_denoiser_is_finetuned_and_the_pipeline_saved(folder, tmp_path):
    common = ("--images", folder / "images", "--size", 16, "--batch-size", 3)
    run("finetune", folder / "pipeline", *common, "--steps", 2, "--lr", 1e-2, "--out", tmp_path / "trained")
    before, after = (pipeline_from_pretrained(f) for f in (folder / "pipeline", tmp_path / "trained"))
    assert not torch.equal(before.unet.conv_in.weight, after.unet.conv_in.weight)
    assert torch.equal(before.vae.encoder.conv_in.weight, after.vae.encoder.conv_in.weight)
    assert (tmp_path / "trained" / "README.md").read_text().count("StableDiffusionPipeline") >= 2


def test_a_pipeline_is_sampled_and_evaluated_with_prompts(folder, tmp_path):
    common = ("--n", 3, "--steps", 1, "--prompts", folder / "prompts.txt")
    run("sample", folder / "pipeline", *common, "--out", tmp_path / "samples")
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 3
    given = ("--images", folder / "images", "--size", 16, "--dense", folder / "pipeline", "--held-out", 4)
    run("evaluate", folder / "pipeline", *common, *given, "--seeds", 1, "--batch-sizes", 1, "--out", tmp_path / "found")
    figures = json.loads((tmp_path / "found" / "evaluation.json").read_text())["figures"]
    assert figures["MSE"]["mean"] == 0  # to itself
    assert figures["loss"]["mean"] > 0
