"""The commands after pruning, and all of them from one file, killed and gone on with."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from processes import new_process, run_ranks
from sklearn.datasets import load_digits
from typer.testing import CliRunner

import diffprune_fast
from diffprune_fast import from_pretrained
from diffprune_fast.cli import app

TINY = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def make_inputs(folder: Path) -> None:
    """A small model with random weights, its scheduler beside it, and scikit-learn's digits as PNGs."""
    torch.manual_seed(0)
    UNet2DModel(**TINY).save_pretrained(folder / "model")
    DDPMScheduler().save_pretrained(folder / "model")
    for name, rows in (("train", slice(0, 24)), ("held", slice(24, 40))):
        (folder / name).mkdir()
        for i, digit in enumerate(load_digits().images[rows]):
            Image.fromarray((digit * 15.9).astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def error(*arguments):
    return run(*arguments, code=2).stderr.strip().splitlines()[-1]


def one_line(inputs: Path, out: Path, **more) -> Path:
    """The YAML of a whole run, with as little of everything as possible."""
    settings = {
        **{"model": str(inputs / "model"), "images": str(inputs / "train"), "held_out": str(inputs / "held")},
        **{"out": str(out), "device": "cpu"},
        "prune": {"macs": 0.6, "max_samples": 32, "batch_size": 8, "round_to": 4},
        "finetune": {"steps": 4, "batch_size": 8, "checkpoint_every": 1},
        "sample": {"n": 4, "steps": 2},
        "evaluate": {"n": 4, "steps": 2, "seeds": 2, "held_out": 8, "batch_sizes": "1"},
        "report": {"title": "Digits"},
        **more,
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def unbroken(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    done = run("run", one_line(inputs, out))
    return out, done


def test_a_folder_of_images_and_a_model_become_a_recovered_model_a_report_and_a_card(unbroken):
    out, done = unbroken
    before = UNet2DModel(**TINY).num_parameters()
    recovered = from_pretrained(out / "recovered")
    assert recovered.num_parameters() < 0.8 * before
    helped = json.loads((out / "recovered" / "run.json").read_text())["helped"]
    assert torch.equal(recovered.conv_out.weight, from_pretrained(out / "pruned").conv_out.weight) != helped
    page = (out / "report.html").read_text()
    assert f"diffprune-fast report {out / 'evaluations' / 'dense'} " in page
    for words in ("dense", "sliced", "compensated", "recovered", "How to load it", "How to reproduce it", "2 seeds"):
        assert words in page
    assert len(json.loads((out / "report.json").read_text())) == 4
    assert (out / "report.csv").read_text().startswith("model,stage,metric,value,deviation")
    card = (out / "recovered" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers")
    assert "SSIM: " in card
    assert f"diffprune-fast run {out.with_suffix('.yaml')}" in card
    assert len(list((out / "samples" / "recovered").glob("0*.png"))) == 4
    assert not (out / "recovered" / "training.pt").exists()
    assert "done: " in done.stdout


def test_a_run_that_is_done_does_nothing_again(unbroken):
    out, _ = unbroken
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = run("run", out.with_suffix(".yaml"))
    assert again.stdout.count("done before") == 10
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_what_was_run_stands_next_to_the_result(unbroken):
    out, _ = unbroken
    found = json.loads((out / "recovered" / "run.json").read_text())
    assert found["command"].startswith(f"diffprune-fast finetune {out / 'pruned'} --images")
    assert "--steps 4" in found["command"]
    assert found["versions"]["diffprune_fast"] == diffprune_fast.__version__
    assert len(found["losses"]) == 4


def killed(config: str, place: str) -> None:
    """A run that is killed in the middle of a stage."""
    torch.set_num_threads(1)

    def kill(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if place == "prune":
        import diffprune_fast.result as module

        module.write_card = kill
    elif place == "finetune":
        from diffprune_fast.recovery.training import Training

        whole = Training._step

        def step(self: Training, n: int) -> tuple[float, float]:
            return kill() if n == 2 else whole(self, n)  # type: ignore[return-value]

        Training._step = step  # type: ignore[method-assign]
    else:
        import diffprune_fast.report.page as module

        module.write_numbers = kill
    app(["run", config])


@pytest.mark.slow
def test_killed_at_three_places_it_ends_with_the_same_result(inputs, unbroken, tmp_path):
    config = one_line(inputs, tmp_path / "out")
    for place in ("prune", "finetune", "report"):
        process = new_process(killed, str(config), place)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, place
    done = run("run", config)
    assert done.stdout.count("done before") == 9
    ours, theirs = (json.loads((o / "recovered" / "run.json").read_text()) for o in (tmp_path / "out", unbroken[0]))
    assert ours["resumed"] == 2
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    models = [from_pretrained(o / "recovered") for o in (tmp_path / "out", unbroken[0])]
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3, msg=name)
    assert (tmp_path / "out" / "report.html").is_file()
    for stage in ("dense", "sliced", "compensated", "recovered"):
        ours, theirs = (figures_of(o / "evaluations" / stage) for o in (tmp_path / "out", unbroken[0]))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4), stage


def figures_of(folder: Path) -> dict[str, float]:
    """What was measured, but for seconds."""
    found = json.loads((folder / "evaluation.json").read_text())["figures"]
    return {name: figure["mean"] for name, figure in found.items() if name != "s/image"}


def test_other_settings_redo_their_stage_and_what_follows(inputs, unbroken, tmp_path):
    out, _ = unbroken
    text = run("run", one_line(inputs, out, report={"title": "Another"})).stdout
    assert text.count("done before") == 9
    assert "<title>Another</title>" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prune": {"maks": 0.5}}, "slice: No such option: --maks"),
        ({"finetune": {"steps": "many"}}, "finetune: Invalid value for '--steps'"),
        ({"finetune": {"loss": "guess", "steps": 2}}, "'guess' is not one of 'noise', 'distillation'"),
        ({"images": None}, "images is missing"),
        ({"colour": 1}, "'colour' is not known"),
        ({"prune": 3}, "prune has to be options"),
    ],
)
def test_a_wrong_file_is_one_line_before_anything_is_done(inputs, tmp_path, more, message):
    assert message in error("run", one_line(inputs, tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


def test_a_run_never_empties_a_folder_of_others(inputs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert "holds other things" in error("run", one_line(inputs, tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_a_dry_run_prints_the_commands(inputs, tmp_path):
    lines = run("run", one_line(inputs, tmp_path / "out"), "--dry-run").stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["prune"] * 2 + ["finetune"] + ["sample"] * 2 + ["evaluate"] * 4 + [
        "report"
    ]
    assert not (tmp_path / "out").exists()


def test_out_is_not_overwritten_without_force(inputs, tmp_path):
    common = ("sample", inputs / "model", "--n", 2, "--steps", 1, "--out", tmp_path / "out")
    run(*common)
    (tmp_path / "out" / "mine.txt").write_text("")
    assert "is there already: choose another, or overwrite it with --force" in error(*common)
    run(*common, "--force")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000.png", "00001.png", "grid.png", "run.json"]


def test_force_removes_nothing_that_is_not_a_result(inputs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    common = ("sample", inputs / "model", "--n", 2, "--steps", 1, "--out", tmp_path / "mine", "--force")
    assert "holds other things, which --force would remove" in error(*common)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers' schedulers
def test_the_same_seed_gives_two_models_the_same_noise_and_spacings_differ(inputs, unbroken, tmp_path):
    def pixels(name, model, *options):
        run("sample", model, "--n", 2, "--steps", 4, "--out", tmp_path / name, *options)
        return np.asarray(Image.open(tmp_path / name / "00001.png")).astype(int)

    dense = pixels("a", inputs / "model")
    assert np.array_equal(pixels("b", inputs / "model"), dense)
    for name, options in {
        "c": ("--seed", 1),
        "d": ("--spacing", "quadratic"),
        "e": ("--solver", "EulerDiscrete"),
    }.items():
        assert not np.array_equal(pixels(name, inputs / "model", *options), dense), name


def sampled_by(rank: int, ranks: int, port: int, words: list[str]) -> None:
    """What accelerate launch starts."""
    torch.set_num_threads(1)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
    }
    app(words, standalone_mode=False)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_several_processes_make_the_images_of_one(inputs, tmp_path):
    def words(name: str) -> list[str]:
        common = ("sample", inputs / "model", "--n", 5, "--steps", 2, "--batch-size", 2, "--device", "cpu")
        return [str(word) for word in (*common, "--out", tmp_path / name)]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(sampled_by, 2, port, words("two"))
    run(*words("one"))
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two").iterdir())
    for name in (n for n in names if n.endswith(".png")):
        one, two = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("one", "two"))
        assert np.abs(one - two).max() <= 1, name


def test_classes_are_sampled_in_turn(tmp_path):
    torch.manual_seed(0)
    UNet2DModel(**TINY, num_class_embeds=3).save_pretrained(tmp_path / "model")
    common = ("sample", tmp_path / "model", "--n", 4, "--steps", 1)
    run(*common, "--labels", "0,2", "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("0*.png"))) == 4
    assert "has 3 classes" in error(*common, "--labels", "7", "--out", tmp_path / "other")
    assert "give numbers" in error(*common, "--labels", "x", "--out", tmp_path / "other")


class Mean(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, ::37]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_distances_need_an_extractor_and_reuse_their_reference(inputs, tmp_path):
    torch.jit.trace(Mean(), torch.zeros(2, 1, 16, 16)).save(str(tmp_path / "features.pt"))
    common = ["evaluate", inputs / "model", "--images", inputs / "held", "--n", 4, "--steps", 1, "--seeds", 1]
    common += ["--held-out", 8, "--features", tmp_path / "features.pt", "--reference", tmp_path / "reference.npz"]
    run(*common, "--out", tmp_path / "one")
    written = (tmp_path / "reference.npz").stat().st_mtime_ns
    first = json.loads((tmp_path / "one" / "evaluation.json").read_text())["figures"]
    assert {"Fréchet distance", "kernel distance", "loss", "s/image"} <= first.keys()
    assert first["loss"]["deviation"] is None
    run(*common, "--out", tmp_path / "two")
    assert (tmp_path / "reference.npz").stat().st_mtime_ns == written
    second = json.loads((tmp_path / "two" / "evaluation.json").read_text())["figures"]
    assert second["Fréchet distance"]["mean"] == pytest.approx(first["Fréchet distance"]["mean"], rel=1e-4)
    assert "--lpips alex: it compares with the dense model's samples" in error(*common, "--lpips", "alex", "--out", "x")
    assert "--clip there: it compares with the prompts" in error(*common, "--clip", "there", "--out", "x")
    (tmp_path / "features.pt").write_text("nothing")
    assert "is no TorchScript file" in error(*common, "--out", tmp_path / "three")


def test_inspect_says_what_can_go_and_what_a_budget_leaves(inputs):
    text = run("inspect", inputs / "model", "--macs", 0.5).stdout
    assert "frozen: " in text
    assert "% of the parameters" in text
    assert "after:  " in text
    assert "after:  " not in run("inspect", inputs / "model").stdout


def test_quiet_prints_nothing_and_version_the_version(inputs, tmp_path):
    assert run("--version").stdout.split() == ["diffprune-fast", diffprune_fast.__version__]
    assert "Usage" in run("finetune", "-h").stdout
    done = run("--quiet", "sample", inputs / "model", "--n", 1, "--steps", 1, "--out", tmp_path / "out")
    assert done.output == ""


def test_an_interrupted_finetune_is_gone_on_with_and_a_finished_one_kept(inputs, tmp_path, monkeypatch):
    from diffprune_fast.recovery.training import Training

    common = ("finetune", inputs / "model", "--images", inputs / "train", "--steps", 3, "--batch-size", 8)
    common += ("--checkpoint-every", 1, "--out", tmp_path / "out")
    whole = Training._step
    with monkeypatch.context() as patched:
        patched.setattr(Training, "_step", lambda self, n: 1 / 0 if n == 2 else whole(self, n))
        run(*common, code=2)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["training.pt"]
    run(*common)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["resumed"] == 2
    assert UNet2DModel.from_pretrained(tmp_path / "out").config.sample_size == 16
    assert "is there already" in error(*common)


def test_an_interrupted_prune_is_gone_on_with(inputs, tmp_path, monkeypatch):
    from diffprune_fast.objective.loss_run import LossRun
    from diffprune_fast.scoring import state

    common = ("prune", inputs / "model", "--images", inputs / "train", "--batch-size", 4, "--max-samples", 32)
    common += ("--macs", 0.6, "--no-compensate", "--no-rotate", "--out", tmp_path / "out")
    monkeypatch.setattr(state, "SECONDS", 0.0)
    whole, calls = LossRun.mean_loss, []

    def counted(self: LossRun, *args: object) -> torch.Tensor:
        calls.append(0)
        return 1 / 0 if len(calls) == 10 else whole(self, *args)  # type: ignore[return-value,arg-type]

    monkeypatch.setattr(LossRun, "mean_loss", counted)
    run(*common, code=2)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["scoring.pt"]
    run(*common)
    assert len(calls) == 10 + 16 - 8  # of 8 micro-batches and 8 draws the first 8 were kept
    assert not (tmp_path / "out" / "scoring.pt").exists()


def test_a_missing_package_is_named_with_the_command_that_installs_it(inputs, unbroken, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    found = error("report", unbroken[0] / "evaluations" / "dense", "--out", tmp_path / "page.html")
    assert "pip install 'diffprune-fast[report]'" in found
