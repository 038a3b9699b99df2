"""The command line and the image folder that it reads."""

from __future__ import annotations

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from calculated_clock import CalculatedClock
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from typer.testing import CliRunner

from diffprune_fast import Plan, from_pretrained
from diffprune_fast.checkpoint.manifest import read_manifest
from diffprune_fast.cli import app
from diffprune_fast.objective import ImageFolder

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@pytest.fixture
def model_dir(tmp_path):
    """A pipeline's folder with a small UNet and a scheduler beside it."""
    torch.manual_seed(0)
    UNet2DModel(**TINY).save_pretrained(tmp_path / "pipeline" / "unet")
    DDPMScheduler(prediction_type="sample").save_pretrained(tmp_path / "pipeline" / "scheduler")
    return tmp_path / "pipeline" / "unet"


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 256, (10 + i, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if i % 2 else "") / f"{i}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def one_error(result):
    """The message of a run that ended as a user's error should: exit code 2 and one line."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:]
    return errors[0]


def test_info_names_the_versions_and_backends():
    result = run("info")
    assert result.exit_code == 0
    assert f"torch            {torch.__version__}" in result.stdout
    assert "channel_scores" in result.stdout


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffprune-fast", "info"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("diffprune_fast", run_name="__main__")
    assert stopped.value.code == 0
    assert "slice_channels" in capsys.readouterr().out


def test_trace_prints_the_plan_and_writes_it(model_dir, tmp_path):
    result = run("trace", model_dir, "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    assert result.stdout.strip() == str(plan)
    assert plan.params() == UNet2DModel(**TINY).num_parameters()


def test_prune_saves_what_it_prints(model_dir, images, tmp_path):
    out = tmp_path / "pruned"
    result = run(
        "prune", model_dir, "--images", images, "--out", out, "--macs", 0.5, "--batch-size", 2, "--max-samples", 32
    )
    assert result.exit_code == 0, result.output
    manifest = read_manifest(out)
    assert manifest["after"]["macs"] <= 0.5 * manifest["before"]["macs"]
    assert f"{manifest['after']['params'] / 1e6:.2f}M parameters" in result.stdout
    assert manifest["scores"]["samples"] == 32
    assert manifest["budget"]["asked"].startswith("macs=0.5")
    assert from_pretrained(out).num_parameters() == manifest["after"]["params"]


def test_a_config_in_place_of_a_budget_gives_a_plain_model(model_dir, images, tmp_path):
    common = ("--images", images, "--batch-size", 2, "--max-samples", 32)
    out, (file, again) = tmp_path / "pruned", (tmp_path / "like.json", tmp_path / "again")
    like = {"block_out_channels": [12, 24]}
    result = run("prune", model_dir, *common, "--out", out, "--like", json.dumps(like))
    assert result.exit_code == 0, result.output
    assert "like block_out_channels=(12, 24)" in result.stdout
    assert f"diffusers.UNet2DModel.from_pretrained('{out}')" in result.stdout
    assert UNet2DModel.from_pretrained(out).config.block_out_channels == [12, 24]
    file.write_text(json.dumps(like))
    assert run("prune", model_dir, *common, "--out", again, "--like", file).exit_code == 0
    assert UNet2DModel.from_pretrained(again).num_parameters() == read_manifest(out)["after"]["params"]
    wrong = ("prune", model_dir, *common, "--out", tmp_path / "wrong", "--like")
    assert "--like is not JSON" in one_error(run(*wrong, "{block"))
    assert "leave out macs=0.5" in one_error(run(*wrong, file, "--macs", 0.5))
    assert "pruning can't add" in one_error(run(*wrong, '{"block_out_channels": [32, 64]}'))
    assert not (tmp_path / "wrong").exists()


def test_blocks_go_first_where_they_are_named(model_dir, images, tmp_path):
    common = ("--images", images, "--macs", 0.6, "--batch-size", 2, "--max-samples", 32, "--out", tmp_path / "out")
    result = run("prune", model_dir, *common, "--drop-blocks", "mid_block.resnets.1, mid_block.attentions.*")
    assert result.exit_code == 0, result.output
    assert "blocks dropped: mid_block.attentions.0, mid_block.resnets.1" in result.stdout
    assert set(read_manifest(tmp_path / "out")["dropped"]) == {"mid_block.attentions.0", "mid_block.resnets.1"}
    assert "is there already" in one_error(run("prune", model_dir, *common, "--drop-blocks", 1))
    result = run("prune", model_dir, *common, "--drop-blocks", 1, "--force")
    assert result.exit_code == 0, result.output
    assert len(read_manifest(tmp_path / "out")["dropped"]) == 1


def test_the_same_seed_prunes_the_same_and_the_scheduler_matters(model_dir, images, tmp_path):
    def keep(name, *more):
        common = ("--images", images, "--batch-size", 2, "--max-samples", 32, "--out", tmp_path / name)
        assert run("prune", model_dir, *common, *more).exit_code == 0
        return {k: v.tolist() for k, v in read_manifest(tmp_path / name)["keep"].items()}

    DDPMScheduler(prediction_type="epsilon").save_pretrained(tmp_path / "other")
    first = keep("one")
    assert keep("two") == first
    assert keep("three", "--scheduler", tmp_path / "other") != first
    assert keep("four", "--seed", 1) != first


def test_a_pruned_model_can_be_traced_and_pruned_again(model_dir, tmp_path):
    assert run("prune", model_dir, "--criterion", "magnitude", "--out", tmp_path / "a").exit_code == 0
    assert run("trace", tmp_path / "a").exit_code == 0
    again = run("prune", tmp_path / "a", "--criterion", "random", "--ratio", 0.5, "--out", tmp_path / "b")
    assert again.exit_code == 0, again.output
    a, b = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    assert b["before"] == a["after"]
    assert from_pretrained(tmp_path / "b").num_parameters() == b["after"]["params"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ratio", "1.5"], "ratio=1.5"),
        (["--ratio", "0.3", "--macs", "0.5"], "give one budget"),
        (["--macs", "0.001"], "gets down to"),
        (["--ignore", "nothing*"], "matches no group"),
        (["--scheduler", "nowhere"], "there is no scheduler_config.json"),
        (["--device", "abacus"], "--device abacus"),
        (["--batch-size", "0"], "give 1 or more"),
    ],
)
def test_wrong_options_are_one_line(model_dir, images, tmp_path, options, says):
    result = run("prune", model_dir, "--images", images, "--out", tmp_path / "out", *options)
    assert says in one_error(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "choices"), [("--ranking", "'local', 'global'"), ("--estimator", "'micro', 'mean'")]
)
def test_an_unknown_choice_names_the_known_ones(model_dir, tmp_path, option, choices):
    result = run("prune", model_dir, "--out", tmp_path / "out", option, "guess")
    assert result.exit_code == 2
    assert choices in result.output
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_left_and_writes_nothing(model_dir, tmp_path):
    done = run("prune", model_dir, "--macs", 0.5, "--out", tmp_path / "out", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "GMACs (which channels go is not known yet)" in done.output
    assert "compensation full" in done.output
    assert not (tmp_path / "out").exists()


def test_own_samples_stand_in_for_images(model_dir, tmp_path):
    done = run("prune", model_dir, "--own-samples", "--macs", 0.6, "--max-samples", 32, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "without data: from 512 images" in done.output
    assert read_manifest(tmp_path / "out")["own_samples"] == 512


def test_images_and_own_samples_exclude_each_other(model_dir, images, tmp_path):
    both = run("prune", model_dir, "--own-samples", "--images", images, "--out", tmp_path / "out")
    assert "give one of them" in one_error(both)


def test_wrong_folders_are_one_line(model_dir, images, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "nowhere is neither a folder nor the name of a repository" in one_error(run("trace", tmp_path / "nowhere"))
    assert "config.json is missing" in one_error(run("trace", images))
    assert "needs a folder of training images" in one_error(run("prune", model_dir, *out))
    assert "is not a folder of images" in one_error(run("prune", model_dir, *out, "--images", "nowhere"))
    assert "holds no images" in one_error(run("prune", model_dir, *out, "--images", model_dir))
    for inside in (model_dir, model_dir / "pruned"):
        assert "own folder" in one_error(run("prune", model_dir, "--out", inside, "--images", images))
    (model_dir.parent / "model_index.json").write_text("{}")
    assert "names None, which is no pipeline" in one_error(run("trace", model_dir.parent))
    assert "own folder" in one_error(run("prune", model_dir, "--out", model_dir.parent / "vae", "--images", images))


def test_what_can_be_refused_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("diffprune_fast.cli.prune.load", loaded.append)
    (tmp_path / "model").mkdir()
    (tmp_path / "file").write_text("")
    common = ("prune", tmp_path / "model", "--criterion", "random")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "file is a file, choose another folder" in one_error(run(*common, "--out", out))
    assert "give one budget" in one_error(run(*common, "--out", tmp_path / "o", "--ratio", 0.3, "--macs", 0.5))
    assert not loaded


def test_damaged_models_are_one_line(model_dir, tmp_path):
    weights = model_dir / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    assert one_error(run("prune", model_dir, "--criterion", "random", "--out", tmp_path / "out"))
    weights.write_bytes(content)
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "_class_name": "Elephant"}))
    assert "'Elephant' is not a model of diffusers" in one_error(run("trace", model_dir))
    (model_dir / "config.json").write_text(json.dumps({**config, "num_class_embeds": 5}))
    assert "are of another model" in one_error(
        run("prune", model_dir, "--criterion", "random", "--out", tmp_path / "x")
    )


def test_a_traceback_can_be_asked_for(tmp_path):
    result = run("--traceback", "trace", tmp_path / "nowhere")
    assert isinstance(result.exception, ValueError)
    assert run("trace", tmp_path / "nowhere").exit_code == 2


def test_images_are_scaled_cut_and_put_between_minus_one_and_one(tmp_path):
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (batch,) = ImageFolder(tmp_path, (4, 4), channels=3)
    assert batch.shape == (1, 3, 4, 4)
    assert (batch == 1).all()
    (batch,) = ImageFolder(tmp_path, (8, 8), channels=1)
    assert batch.shape == (1, 1, 8, 8)
    assert batch.min() >= -1


def test_image_order_follows_the_seed_and_every_image_comes_once(images):
    def first(seed):
        return torch.cat(list(ImageFolder(images, (8, 8), batch_size=4, seed=seed)))

    assert len(ImageFolder(images, (8, 8), batch_size=4)) == 2
    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))
    assert torch.equal(first(0).sum((1, 2, 3)).sort().values, first(1).sum((1, 2, 3)).sort().values)


def test_unreadable_images_are_named(images):
    (images / "broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken.jpg can't be read as an image"):
        list(ImageFolder(images, (8, 8)))


def test_models_of_latents_are_refused(images):
    with pytest.raises(ValueError, match="takes 4 channels"):
        ImageFolder(images, (8, 8), channels=4)


def test_budgets_of_time_and_memory_are_measured(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("diffprune_fast.footprint.times.DeviceClock", lambda device: CalculatedClock())
    asked = ("--criterion", "magnitude", "--latency", 0.6, "--memory", 0.9, "--round-to", 4)
    result = run("prune", model_dir, "--out", tmp_path / "pruned", *asked)
    assert result.exit_code == 0, result.output
    assert "latency: asked 0.6, predicted" in result.stderr + result.stdout
    assert "memory: asked 0.9, predicted" in result.stderr + result.stdout
    assert "leave it out" in one_error(run("prune", model_dir, "--out", tmp_path / "other", "--dry-run", *asked))
