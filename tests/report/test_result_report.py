"""What a result writes of itself: a page, numbers beside it, a card, a repository."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from huggingface_hub import ModelCard

from diffprune_fast import score_and_prune
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


def test_pushing_uploads_what_saving_writes(result, monkeypatch):
    sent = {}

    class Hub:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, **options):
            sent["made"] = (repo_id, options)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            from pathlib import Path

            sent["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert result.push_to_hub("me/small", private=True) == "https://hub/me/small"
    assert sent["made"] == ("me/small", {"private": True, "exist_ok": True})
    assert sent["files"] == ["README.md", "diffprune.json", "diffprune_model.safetensors"]


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
