"""pruna's smash, save and load with this package's algorithm; without pruna all of these are left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from models import small_unet
from tiny_pipelines import made

from diffprune_fast.pipelines.components import find_component

os.environ.setdefault("PRUNA_METRICS_ENABLED", "false")  # it would send how often it is used
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("pruna", reason="pruna isn't installed, and its versions of other packages aren't ours")
    from pruna import PrunaModel, SmashConfig, smash

    from diffprune_fast.integrations.pruna import batches_of, register

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def algorithm() -> Any:
    return register()


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def made_of(**options: Any) -> Any:
        options = {"criterion": "magnitude", "compensate": False, **options}
        return SmashConfig({"diffprune": options}, device="cpu", cache_dir_prefix=tmp_path_factory.mktemp("cache"))

    return made_of


class Data:
    """What a SmashConfig has of its data: a function that gives a loader."""

    def __init__(self, batches: list[Any]) -> None:
        self.train_dataloader = lambda **_: batches


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return small_unet().eval()


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16), 7).sample


def test_registering_twice_gives_the_same_algorithm(algorithm: Any) -> None:
    assert register() is algorithm


@pytest.mark.parametrize("layout", ["free", "config"])
def test_smash_save_and_load_give_the_same_outputs(layout: str, config: Any, tmp_path: Path) -> None:
    smashed = smash(unet(), config(share=0.6, layout=layout))
    assert sum(p.numel() for p in smashed.model.parameters()) < sum(p.numel() for p in unet().parameters())
    smashed.save_pretrained(str(tmp_path))
    loaded = PrunaModel.from_pretrained(str(tmp_path))
    assert type(loaded.model) is UNet2DModel
    torch.testing.assert_close(run(loaded), run(smashed))


def test_what_a_config_describes_is_loaded_by_its_class(config: Any, tmp_path: Path) -> None:
    smashed = smash(unet(), config(layout="config"))
    smashed.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "smash_config.json").read_text())["load_fns"] == ["diffusers"]
    torch.testing.assert_close(run(UNet2DModel.from_pretrained(tmp_path)), run(smashed))


def test_nothing_is_pickled(config: Any, tmp_path: Path) -> None:
    smash(unet(), config()).save_pretrained(str(tmp_path))
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_a_pipeline_is_smashed_saved_and_loaded(config: Any, tmp_path: Path) -> None:
    pipe = made("ddpm")
    before = sum(p.numel() for p in pipe.unet.parameters())
    smash(pipe, config()).save_pretrained(str(tmp_path))
    loaded = PrunaModel.from_pretrained(str(tmp_path)).model
    assert type(loaded) is type(pipe)
    assert sum(p.numel() for p in loaded.unet.parameters()) < before
    for mine, theirs in zip(pipe.unet.parameters(), loaded.unet.parameters()):
        assert torch.equal(mine, theirs)


def test_data_of_the_configuration_is_scored_with(config: Any) -> None:
    smash_config = config(criterion="diff-pruning", compensate=True, max_samples=32)
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    smash_config.data = Data([([""] * 16, images)])
    smashed = smash(unet(), smash_config)
    assert smashed.model.conv_in.weight.shape[0] <= 32
    assert run(smashed).isfinite().all()


def test_images_of_bytes_get_the_range_that_models_are_trained_with() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 2, 1, 1)
    (batch,) = batches_of([([""], images)], unet())
    assert batch.flatten().tolist() == [-1, 1]


def test_captions_stay_beside_the_images_of_a_pipeline_from_text() -> None:
    images = torch.zeros(1, 3, 8, 8)
    ((found, captions),) = batches_of([(["a cat"], images)], made("stable_diffusion"))
    assert found is images
    assert captions == ["a cat"]


def test_prompts_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="prompts alone"):
        next(iter(batches_of([(["a cat"], None)], made("stable_diffusion"))))


@pytest.mark.parametrize("name", ["dit", "flux", "stable_diffusion"])
def test_pipelines_that_its_own_pruner_refuses(name: str, config: Any) -> None:
    pipe = made(name)
    _, denoiser = find_component(pipe)
    theirs = SmashConfig(["torch_structured"], device="cpu")
    theirs.data = Data([])
    with pytest.raises(ValueError, match="not compatible with torch_structured"):
        smash(pipe, theirs)
    before = denoiser.num_parameters()
    smash(pipe, config(share=0.7))
    assert denoiser.num_parameters() < before


def test_another_component_of_a_pipeline(config: Any, tmp_path: Path) -> None:
    pipe = made("stable_diffusion")
    denoiser, vae = pipe.unet.num_parameters(), pipe.vae.num_parameters()
    smash(pipe, config(component="vae")).save_pretrained(str(tmp_path))
    loaded = PrunaModel.from_pretrained(str(tmp_path)).model
    assert loaded.unet.num_parameters() == denoiser
    assert loaded.vae.num_parameters() == pipe.vae.num_parameters() < vae


def test_a_model_that_is_not_of_diffusers_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match="not compatible with diffprune"):
        smash(torch.nn.Linear(4, 4), config())


def test_pruning_comes_before_half_precision(config: Any, tmp_path: Path) -> None:
    smash_config = config()
    smash_config.add("half")
    smashed = smash(unet(), smash_config, experimental=True)
    assert smashed.model.dtype == torch.float16
    smashed.save_pretrained(str(tmp_path))
    assert PrunaModel.from_pretrained(str(tmp_path)).model.dtype == torch.float16


def test_the_package_imports_without_importing_pruna() -> None:
    script = "import sys, diffprune_fast.integrations; assert 'pruna' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
