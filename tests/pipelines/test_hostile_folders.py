"""Folders of a stranger: nothing in them runs, nothing outside them is read, and each is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMScheduler
from tiny_pipelines import made
from typer.testing import CliRunner

import diffprune_fast as dpf
from diffprune_fast.checkpoint import CheckpointError
from diffprune_fast.cli import app

Attack = Callable[[Path], object]


class Opened(BaseException):
    """A pickle was opened: no loader catches it."""


class Trap:
    def __reduce__(self) -> Any:
        return Opened, ()


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harmless")
    made("ddpm").save_pretrained(folder / "ddpm")
    made("stable_diffusion").save_pretrained(folder / "stable_diffusion")
    pipe = made("ddpm")
    dpf.score_and_prune(pipe, None, criterion="magnitude", ratio=0.3).save_pretrained(folder / "pruned")
    return folder


@pytest.fixture
def work(harmless: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt, with code that leaves a file behind in every place where somebody might run it."""
    shutil.copytree(harmless, tmp_path / "work")
    for folder in ("ddpm", "stable_diffusion"):
        whole = tmp_path / "work" / folder
        code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom diffusers import DDPMScheduler\n"
        code += "class b(DDPMScheduler): pass\nclass Evil(b): pass\nMyPipeline = Evil\n"
        for place in [whole, *(p for p in whole.iterdir() if p.is_dir())]:
            for name in ("a", "evil", "pipeline", "my_pipeline", "diffusers", "modeling_evil"):
                if name != "diffusers" or place == whole:
                    (place / f"{name}.py").write_text(code)
    return tmp_path / "work"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def index(**changes: Any) -> Attack:
    return lambda folder: edit(folder / "model_index.json", **changes)


def both(*attacks: Attack) -> Attack:
    return lambda folder: [attack(folder) for attack in attacks]


def moved_out(name: str) -> Attack:
    """What is at ``name`` lies outside, with a link where it was."""

    def attack(folder: Path) -> None:
        outside = folder.parent / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return attack


def pruned_as(name: str) -> Attack:
    """A pruned model in the folder of a component with this name."""
    return lambda folder: shutil.copytree(folder.parent / "pruned" / "unet", folder / name)


def config(component: str, name: str = "config.json", **changes: Any) -> Attack:
    return lambda folder: edit(folder / component / name, **changes)


def tokens(**changes: Any) -> Attack:
    return config("tokenizer", "tokenizer_config.json", **changes)


def pickled(component: str, to: str, shards: bool = False) -> Attack:
    """The weights are a pickle; ``shards``: a list of shards names it."""

    def attack(folder: Path) -> None:
        (weights,) = (folder / component).glob("*.safetensors")
        (folder / component / to).write_bytes(pickle.dumps(Trap()))
        if shards:
            listed = {"metadata": {}, "weight_map": {"conv_in.weight": to}}
            (folder / component / f"{weights.name}.index.json").write_text(json.dumps(listed))
        weights.unlink()

    return attack


def fifo(name: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return attack


def text(name: str, content: str) -> Attack:
    return lambda folder: (folder / name).write_text(content)


EVIL = {"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
LARGE = '{"a":' * 200_000

ATTACKS: dict[str, tuple[str, Attack, str]] = {
    "two letters": ("ddpm", index(scheduler="ab"), "scheduler is 'ab'"),
    "two keys": ("ddpm", index(scheduler={"a": 1, "b": 2}), "scheduler is {"),
    "a list in a list": ("ddpm", index(scheduler=["diffusers", ["DDPMScheduler"]]), "scheduler is"),
    "a pair in a list": ("ddpm", index(scheduler=[["a", "b"]]), "scheduler is"),
    "three things": ("ddpm", index(scheduler=["diffusers", "DDPMScheduler", "a"]), "scheduler is"),
    "a number": ("ddpm", index(scheduler=7), "scheduler is 7"),
    "true": ("ddpm", index(scheduler=True), "scheduler is True"),
    "half nothing": ("ddpm", index(scheduler=[None, "b"]), "scheduler is"),
    "nothing where something is needed": ("ddpm", index(unet=[None, None]), "lacks unet"),
    "a name of the loader": ("ddpm", both(pruned_as("trust_remote_code"), index(trust_remote_code=True)), "trust_rem"),
    "a pair of that name": (
        "ddpm",
        both(pruned_as("trust_remote_code"), index(trust_remote_code=["diffusers", "UNet2DModel"], scheduler="ab")),
        "'trust_remote_code'|scheduler is",
    ),
    "custom_pipeline": ("ddpm", index(custom_pipeline="my_pipeline"), "'custom_pipeline'"),
    "a component from outside": (
        "ddpm",
        both(pruned_as("../outside"), index(**{"../outside": ["diffusers", "UNet2DModel"]})),
        "'../outside'",
    ),
    "an absolute name": ("ddpm", index(**{"/tmp/outside": ["diffusers", "UNet2DModel"]}), "'/tmp/outside'"),
    "self": ("ddpm", index(self=["diffusers", "UNet2DModel"]), "'self'"),
    "code of the folder": ("ddpm", index(scheduler=["evil", "Evil"]), "scheduler is"),
    "a path for a library": ("ddpm", index(scheduler=["../evil", "Evil"]), "scheduler is"),
    "a dotted library": ("ddpm", index(scheduler=["diffusers.schedulers", "DDPMScheduler"]), "scheduler is"),
    "os": ("ddpm", index(scheduler=["os", "system"]), "scheduler is"),
    "a module of pipelines": ("ddpm", index(scheduler=["pipeline_utils", "DiffusionPipeline"]), "scheduler is"),
    "what a module imports": ("ddpm", index(scheduler=["ddpm", "DiffusionPipeline"]), "scheduler is"),
    "a pipeline in a pipeline": ("ddpm", index(unet=["diffusers", "DDPMPipeline"]), "unet is"),
    "a base class": ("ddpm", index(unet=["diffusers", "ModelMixin"]), "unet is"),
    "a class by the folder's config": ("ddpm", index(unet=["diffusers", "AutoModel"]), "unet is"),
    "a config": ("ddpm", index(unet=["transformers", "CLIPTextConfig"]), "unet is"),
    "a function": ("ddpm", index(unet=["transformers", "pipeline"]), "unet is"),
    "a pipeline of the folder": ("ddpm", index(_class_name=["my_pipeline", "MyPipeline"]), "no pipeline of diffusers"),
    "any pipeline": ("ddpm", index(_class_name="DiffusionPipeline"), "no pipeline of diffusers"),
    "a dotted pipeline": ("ddpm", index(_class_name="pipelines.DDPMPipeline"), "no pipeline of diffusers"),
    "no pipeline": ("ddpm", index(_class_name="__class__"), "no pipeline of diffusers"),
    "another underscore": ("ddpm", index(_module="my_pipeline"), "'_module'"),
    "an argument that is a class": (
        "stable_diffusion",
        index(requires_safety_checker=["evil", "Evil"]),
        "requires_safety_checker is",
    ),
    "a deep argument": ("stable_diffusion", index(requires_safety_checker={"a": {"b": {}}}), "requires_safety_checker"),
    "a linked component": ("ddpm", moved_out("scheduler"), "outside"),
    "a linked config": ("ddpm", moved_out("unet/config.json"), "outside"),
    "linked weights": ("ddpm", moved_out("unet/diffusion_pytorch_model.safetensors"), "outside"),
    "a linked index": ("ddpm", moved_out("model_index.json"), "outside"),
    "an index that never ends": ("ddpm", fifo("model_index.json"), "no ordinary file"),
    "a config that never ends": ("ddpm", fifo("scheduler/scheduler_config.json"), "no ordinary file"),
    "a deep index": ("ddpm", text("model_index.json", LARGE), "model_index.json"),
    "a deep config": ("ddpm", text("scheduler/scheduler_config.json", LARGE), "scheduler"),
    "a list for an index": ("ddpm", text("model_index.json", "[]"), "no pipeline of diffusers"),
    "a code map": ("stable_diffusion", config("text_encoder", auto_map=EVIL), "auto_map"),
    "a code map further in": ("stable_diffusion", config("text_encoder", text_config={"auto_map": EVIL}), "auto_map"),
    "a code map of the tokenizer": ("stable_diffusion", tokens(auto_map=EVIL), "auto_map"),
    "a kernel from the hub": ("stable_diffusion", config("text_encoder", attn_implementation="evil/k"), "attn_impl"),
    "the same kernel": ("stable_diffusion", config("text_encoder", _attn_implementation="evil/k"), "attn_impl"),
    "another model's adapter": (
        "stable_diffusion",
        text("text_encoder/adapter_config.json", '{"base_model_name_or_path": "../outside"}'),
        "adapter_config.json",
    ),
    "a quantizer": ("ddpm", config("unet", quantization_config={"quant_method": "modelopt"}), "quantization_config"),
    "a pickle": ("ddpm", pickled("unet", "diffusion_pytorch_model.bin"), "unet"),
    "a pickle of a text encoder": ("stable_diffusion", pickled("text_encoder", "pytorch_model.bin"), "text_encoder"),
    "a pickled shard": ("ddpm", pickled("unet", "shard.bin", shards=True), "shard.bin"),
    "a shard outside": ("ddpm", pickled("unet", "../../outside.safetensors", shards=True), "outside.safetensors"),
    "a shard of a variant outside": (
        "ddpm",
        text(
            "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
            '{"metadata": {}, "weight_map": {"conv_in.weight": "../../outside.safetensors"}}',
        ),
        "outside.safetensors",
    ),
    "years of timesteps": (
        "ddpm",
        config("scheduler", "scheduler_config.json", num_train_timesteps=10**12),
        "num_train_timesteps",
    ),
}  # fmt: skip


def limited(run: Callable[[], object]) -> None:
    """Nothing may wait for a file that never ends."""

    def late(*_: Any) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        run()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_pipeline_is_refused_and_nothing_of_it_runs(name: str, work: Path) -> None:
    folder, attack, words = ATTACKS[name]
    attack(work / folder)
    with pytest.raises(CheckpointError, match=words):
        limited(lambda: dpf.pipeline_from_pretrained(work / folder))
    assert not (work.parent / "ran").exists()


@pytest.mark.parametrize("name", ["two letters", "a component from outside", "a pickle", "a config that never ends"])
def test_the_command_line_refuses_the_same(name: str, work: Path) -> None:
    folder, attack, _ = ATTACKS[name]
    attack(work / folder)
    command = ["prune", str(work / folder), "--criterion", "magnitude", "--out", str(work / "out")]
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, done.stderr[:7]) == (2, "error: "), done.output
    assert not (work.parent / "ran").exists()
    assert not (work / "out").exists()


MODELS: dict[str, tuple[Attack, str]] = {
    "a pickle": (pickled("unet", "diffusion_pytorch_model.bin"), "safetensors"),
    "a pickled shard": (pickled("unet", "shard.bin", shards=True), "shard.bin"),
    "a class by its config": (config("unet", _class_name="AutoModel"), "not a model of diffusers"),
    "a code map": (config("unet", auto_map=EVIL), "auto_map"),
    "linked weights": (moved_out("unet/diffusion_pytorch_model.safetensors"), "outside"),
    "a config that never ends": (fifo("unet/config.json"), "no ordinary file"),
    "a quantizer": (config("unet", quantization_config={"quant_method": "modelopt"}), "quantization_config"),
    "more layers than time": (config("unet", layers_per_block=10**7), "layers_per_block|modules"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_command_line_refuses_a_hostile_model(name: str, work: Path) -> None:
    attack, words = MODELS[name]
    (work / "ddpm" / "model_index.json").unlink()
    attack(work / "ddpm")
    command = ["prune", str(work / "ddpm" / "unet"), "--criterion", "magnitude", "--out", str(work / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2, done.output
    assert re.search(words, done.stderr), done.stderr
    assert not (work.parent / "ran").exists()


@pytest.mark.parametrize("folder", ["ddpm", "stable_diffusion", "pruned"])
def test_code_that_lies_about_is_left_alone(folder: str, work: Path) -> None:
    pipe = dpf.pipeline_from_pretrained(work / folder)
    assert isinstance(pipe.scheduler, DDPMScheduler) or folder == "stable_diffusion"
    assert not (work.parent / "ran").exists()


def test_the_cache_of_the_hub_is_a_folder_of_links(work: Path) -> None:
    snapshot, blobs = work / "hub" / "snapshots" / "0123", work / "hub" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(work / "pruned", snapshot)
    for i, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        shutil.move(path, blobs / str(i))
        path.symlink_to(os.path.relpath(blobs / str(i), path.parent))
    dpf.pipeline_from_pretrained(snapshot)
    dpf.from_pretrained(snapshot / "unet")
