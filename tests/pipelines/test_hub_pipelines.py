"""Pipelines of the hub: fetched by what their index names, under the same rules as a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_cache import Hub, stand_in
from tiny_pipelines import made

import diffprune_fast as dpf
from diffprune_fast.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline from text in two variants, and the same with its denoiser pruned."""
    folder = tmp_path_factory.mktemp("repositories")
    pipe = made("stable_diffusion")
    pipe.save_pretrained(folder / "text")
    pipe.unet.conv_in.bias.data.fill_(2)
    pipe.save_pretrained(folder / "text", variant="fp16")
    (folder / "text" / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    shutil.copy(folder / "text" / "vae" / "diffusion_pytorch_model.safetensors", folder / "text" / "whole.safetensors")
    (folder / "text" / "unet" / "pipeline.py").write_text("raise SystemExit")
    (folder / "text" / "lora").mkdir()
    (folder / "text" / "lora" / "adapter_config.json").write_text("{}")  # which a folder would be refused for
    (folder / "text" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    pipe = made("ddpm")
    dpf.score_and_prune(pipe, None, criterion="magnitude", ratio=0.3).save_pretrained(folder / "pruned")
    shutil.copytree(folder / "pruned", folder / "many" / "first")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def hub(repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    return stand_in(monkeypatch, tmp_path / "cache", **repositories)


def test_a_pipelines_components_are_fetched_and_nothing_beside_them(hub: Hub) -> None:
    pipe = dpf.pipeline_from_pretrained("user/text", revision="v1")
    assert set(hub.asked) == {("user/text", "v1")}
    assert pipe.unet.conv_in.bias.max() < 2
    fetched = hub.fetched("user/text")
    assert {name for name in fetched if name.endswith(".safetensors")} == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert {Path(name).suffix for name in fetched} <= {".json", ".safetensors", ".txt"}
    assert not [name for name in fetched if name.startswith("lora/")]


def test_a_variant_is_fetched_and_loaded_where_a_component_has_it(hub: Hub) -> None:
    pipe = dpf.pipeline_from_pretrained("user/text", variant="fp16")
    assert pipe.unet.conv_in.bias.min() == 2
    assert {name for name in hub.fetched("user/text") if name.endswith(".safetensors")} == {
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_a_variant_of_a_folder_is_loaded(repositories: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(repositories["text"], tmp_path / "text", ignore=shutil.ignore_patterns("lora"))
    assert dpf.pipeline_from_pretrained(tmp_path / "text", variant="fp16").unet.conv_in.bias.min() == 2


def test_a_pruned_pipeline_comes_from_the_hub_and_from_a_subfolder_there(hub: Hub) -> None:
    pruned = dpf.pipeline_from_pretrained("user/pruned").unet
    found = dpf.pipeline_from_pretrained("user/many", subfolder="first").unet
    assert all(torch.equal(p, q) for p, q in zip(pruned.parameters(), found.parameters(), strict=True))


def spoilt(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        change(index)
        (folder / "model_index.json").write_text(json.dumps(index))

    return attack


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (spoilt(lambda index: index.update(unet=["evil", "Evil"])), "unet is"),
        (spoilt(lambda index: index.update({"../other": ["diffusers", "UNet2DModel"]})), "'../other'"),
        (spoilt(lambda index: index.update(custom_pipeline="my_pipeline")), "'custom_pipeline'"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "no index of a pipeline"),
        (lambda folder: (folder / "model_index.json").write_text('{"a":' * 200_000), "model_index.json"),
    ],
)
def test_a_hostile_repository_is_refused_as_its_folder_is(
    hub: Hub, repositories: dict[str, Path], tmp_path: Path, attack: Callable[[Path], None], words: str
) -> None:
    hub.repositories["user/evil"] = tmp_path / "evil"
    shutil.copytree(repositories["pruned"], tmp_path / "evil")
    attack(tmp_path / "evil")
    with pytest.raises(CheckpointError, match=words):
        dpf.pipeline_from_pretrained("user/evil")


@pytest.fixture
def flat(repositories: dict[str, Path], tmp_path: Path) -> Path:
    """A model, its scheduler and the index in one folder, as older repositories have them."""
    folder = tmp_path / "flat"
    made("ddpm").save_pretrained(folder)
    for path in [*folder.glob("unet/*"), *folder.glob("scheduler/*")]:
        shutil.move(path, folder)
    for name in ("unet", "scheduler"):
        (folder / name).rmdir()
    return folder


def test_a_pipeline_whose_parts_lie_beside_its_index_is_loaded(hub: Hub, flat: Path) -> None:
    hub.repositories["user/flat"] = flat
    for place in (flat, "user/flat"):
        pipe = dpf.pipeline_from_pretrained(place)
        assert type(pipe.unet).__name__ == "UNet2DModel"
        assert type(pipe.scheduler).__name__ == "DDPMScheduler"


def test_a_component_is_not_taken_from_another_ones_config(flat: Path) -> None:
    config = json.loads((flat / "config.json").read_text())
    (flat / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    with pytest.raises(CheckpointError, match="unet is missing: copy the whole pipeline"):
        dpf.pipeline_from_pretrained(flat)
