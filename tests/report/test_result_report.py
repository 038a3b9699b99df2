"""What a result writes of itself: a page, numbers beside it, a card, a repository."""

from __future__ import annotations

import csv
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline
from hub_cache import stand_in
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from tiny_pipelines import made

from diffprune_fast import from_pretrained, score_and_prune
from diffprune_fast.report import Measured, write_card, write_report
from diffprune_fast.report.table import lines


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    return score_and_prune(model, None, criterion="magnitude", ratio=0.5, example_inputs=(torch.zeros(1, 4),))


def test_a_result_reports_itself(result, tmp_path):
    page = result.report(tmp_path / "page.html", title="Half").read_text()
    assert "<title>Half</title>" in page
    assert "Kept channels" in page
    assert "ratio=0.5" in page
    found = json.loads((tmp_path / "page.json").read_text())
    assert [row["params"] for row in found] == [result.before.params, result.after.params]


def test_a_saved_model_has_a_card_that_the_hub_can_read(result, tmp_path):
    result.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "diffusers"
    assert "diffprune-fast" in card.data.tags
    assert f"| parameters | {result.before.params:,} | {result.after.params:,}" in card.text
    assert "from diffprune_fast import from_pretrained" in card.text
    write_card(tmp_path, command="make it", figures={"loss": "0.03 ± 0.001"})
    text = (tmp_path / "README.md").read_text()
    assert "make it" in text
    assert "- loss: 0.03 ± 0.001" in text


def test_somebody_elses_readme_is_left_alone(result, tmp_path):
    (tmp_path / "README.md").write_text("my own words")
    result.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_a_folder_without_a_model_gets_no_card(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        write_card(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What was sent to the hub, and a hub that has it."""
    sent = stand_in(monkeypatch, tmp_path / "cache")
    sent.made, sent.uploads = [], []

    class Api:
        def __init__(self, token=None):
            sent.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            assert exist_ok
            sent.made.append((repo_id, private))

        def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
            there = sent.repositories.setdefault(repo_id, tmp_path / "repositories" / repo_id)
            if there.exists():
                names = [p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()]
                for name in filter_repo_objects(names, allow_patterns=delete_patterns):
                    (there / name).unlink()
            shutil.copytree(folder_path, there, dirs_exist_ok=True)
            sent.uploads.append(commit_message)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.chdir(tmp_path)
    return sent


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "private", "message"),
    [({}, None, "Sequential, pruned"), ({"private": True, "commit_message": "Half of it"}, True, "Half of it")],
)
def test_what_is_pushed_comes_back(result, hub, options, private, message):
    assert result.push_to_hub("me/small", token="t", **options) == "https://hub/me/small"
    assert (hub.token, hub.made, hub.uploads) == ("t", [("me/small", private)], [message])
    folder = hub.repositories["me/small"]
    assert files_in(folder) == {"README.md", "diffprune.json", "diffprune_model.safetensors"}
    text = ModelCard.load(folder / "README.md").text
    assert f"| parameters | {result.before.params:,} | {result.after.params:,}" in text
    dense = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    found = from_pretrained("me/small", dense)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), result.model.parameters(), strict=True))


def test_pushing_again_leaves_nothing_that_would_be_read_in_place_of_the_new(hub):
    """diffusers reads a list of shards before it looks for weights."""
    pushed = []
    for budget in ({"macs": 0.6}, {"like": {"block_out_channels": (8, 16)}}):
        pipe = made("ddpm")
        pushed.append(score_and_prune(pipe, None, criterion="magnitude", round_to=4, **budget))
        pushed[-1].push_to_hub("me/pipe", max_shard_size=None if len(pushed) == 2 else 20_000)
        hub.repositories["me/pipe"].joinpath("unet", "mine.txt").touch()
    found = DDPMPipeline.from_pretrained(hub.repositories["me/pipe"]).unet
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), pushed[1].model.parameters(), strict=True))
    assert {name for name in files_in(hub.repositories["me/pipe"]) if name.startswith("unet/")} == {
        f"unet/{name}" for name in ("config.json", "diffprune.json", "diffusion_pytorch_model.safetensors", "mine.txt")
    }
    assert "DDPMPipeline" in (hub.repositories["me/pipe"] / "README.md").read_text()


def test_the_models_own_push_to_hub_sends_the_pruned_model(tmp_path, monkeypatch):
    from diffusers.utils import hub_utils

    model = score_and_prune(made("ddpm"), None, criterion="magnitude", macs=0.6).model
    repository = SimpleNamespace(repo_id="me/unet")
    monkeypatch.setattr(hub_utils, "create_repo", lambda *_, **__: repository)
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *_, **__: ModelCard("---\ntags: []\n---\n"))
    monkeypatch.setattr(
        hub_utils, "upload_folder", lambda **sent: shutil.copytree(sent["folder_path"], tmp_path / "hub")
    )
    model.push_to_hub("me/unet", variant="fp16")
    found = from_pretrained(tmp_path / "hub", variant="fp16")
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), model.parameters(), strict=True))


ROWS = [
    Measured("dense", 1000, 5000, None, {"": {"loss": 0.03}}, {"": {"loss": 0.001}}),
    Measured("a", 500, 2000, None, {"": {"loss": 0.0412}}, {"": {"loss": 0.002}}),
    Measured("b", 500, 2000, None, {"": {"loss": 0.0433}}),
]


def test_deviations_stand_beside_their_means_and_the_best_is_still_marked():
    (loss,) = [line for line in lines(ROWS) if line.heading == "loss"]
    assert loss.cells == ("0.0300 ± 0.0010", "0.0412 ± 0.0020", "0.0433")
    assert loss.best == (False, True, False)


def test_the_tables_numbers_are_beside_the_page_unrounded(tmp_path):
    write_report(tmp_path / "page.html", ROWS, {}, title="t", code={"How to load it": "x <- y"})
    page = (tmp_path / "page.html").read_text()
    assert "page.json, page.csv" in page
    assert "x &lt;- y" in page
    with (tmp_path / "page.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["value"] for r in rows if r["model"] == "a" and r["metric"] == "loss"] == ["0.0412"]
    assert [r["deviation"] for r in rows if r["model"] == "dense" and r["metric"] == "loss"] == ["0.001"]


def test_the_page_has_a_dark_a_narrow_and_a_printed_form(tmp_path):
    write_report(tmp_path / "page.html", ROWS, {}, title="t")
    page = (tmp_path / "page.html").read_text()
    for rule in ("prefers-color-scheme: dark", "max-width: 32rem", "@media print", "overflow-x: auto"):
        assert rule in page
