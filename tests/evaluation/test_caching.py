"""diffusers' caches while sampling: of a pruned model as of a dense one, and gone afterwards."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, FirstBlockCacheConfig, UNet2DModel
from PIL import Image
from tiny_pipelines import made as made_pipe
from torch import Tensor, nn
from typer.testing import CliRunner
from zoo import ZOO

import diffprune_fast as dpf
from diffprune_fast.choices import Cache
from diffprune_fast.cli import app
from diffprune_fast.evaluation import sample
from diffprune_fast.evaluation.caching import cached

NAMES = Cache.__args__  # type: ignore[attr-defined]


def dit(**changes: Any) -> Any:
    torch.manual_seed(0)
    known = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 4}
    model = DiTTransformer2DModel(**{**known, "sample_size": 8, "num_embeds_ada_norm": 10, **changes}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)  # its last layer begins with zeros
    return model


@pytest.fixture(scope="module")
def pruned() -> Any:
    example = (torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    return dpf.score_and_prune(dit(), None, criterion="random", macs=0.6, round_to=4, example_inputs=example).model


class Counted:
    """How often the blocks of a model, and their attentions, are run."""

    def __init__(self, model: Any) -> None:
        self.attentions = self.feed_forwards = 0
        for block in model.transformer_blocks[1:]:
            block.attn1.to_q.register_forward_hook(lambda *_: setattr(self, "attentions", self.attentions + 1))
            block.ff.register_forward_hook(lambda *_: setattr(self, "feed_forwards", self.feed_forwards + 1))


def made(model: nn.Module, n: int = 2, **options: Any) -> Tensor:
    noise = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return sample(model, DDPMScheduler(), noise, labels=torch.arange(n), **{"steps": 10, **options})


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_model_leaves_out_what_the_cache_has(pruned: Any, name: str) -> None:
    model = copy.deepcopy(pruned)
    counted = Counted(model)
    cache: Any = FirstBlockCacheConfig(threshold=1e9) if name == "first-block" else name
    found = made(model, cache=cache)
    if name == "first-block":  # the first step alone runs all blocks
        assert (counted.attentions, counted.feed_forwards) == (3, 3)
    else:
        assert counted.attentions < counted.feed_forwards == 30
    assert not torch.equal(found, made(pruned))


def test_a_cache_that_never_serves_changes_nothing(pruned: Any) -> None:
    torch.testing.assert_close(made(pruned, cache=FirstBlockCacheConfig(threshold=0.0)), made(pruned))


@pytest.mark.parametrize("name", NAMES)
def test_every_batch_begins_with_nothing(pruned: Any, name: str) -> None:
    """Batches of other sizes too: what is kept of one would not fit the next."""
    alone = made(pruned, 3, cache=name, batch_size=2)[2:]
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))[2:]
    found = sample(pruned, DDPMScheduler(), noise, labels=torch.tensor([2]), steps=10, cache=name)
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_as_it_was_also_after_an_error(pruned: Any, name: str) -> None:
    before = {path: set(vars(module)) for path, module in pruned.named_modules()}
    hooks = len(pruned._forward_pre_hooks)
    want = made(pruned)
    with pytest.raises(IndexError, match="out of range"), cached(pruned, name):
        pruned(torch.zeros(1, 1, 8, 8), torch.tensor([500]), torch.tensor([10**6]))
    assert {path: set(vars(module)) for path, module in pruned.named_modules()} == before
    assert len(pruned._forward_pre_hooks) == hooks
    torch.testing.assert_close(made(pruned), want)


def test_a_class_that_has_caches_of_its_own_is_served_alike() -> None:
    case = next(c for c in ZOO if c.name == "FluxTransformer2DModel")
    torch.manual_seed(0)
    model: Any = case.make().double().eval()
    dpf.score_and_prune(model, None, criterion="random", ratio=0.4, example_inputs=case.example_inputs)
    with torch.no_grad(), cached(model, FirstBlockCacheConfig(threshold=1e9)):
        first, runs = case.run(model), []
        model.transformer_blocks[-1].ff.register_forward_hook(lambda *_: runs.append(0))
        torch.testing.assert_close(case.run(model), first)
    assert runs == []


@pytest.mark.parametrize(
    ("cache", "says"),
    [
        ("teacache", "choose one of 'first-block', 'pyramid-attention', 'faster-cache'"),
        (3, "cache is a int: give a name"),
    ],
)
def test_an_unknown_cache_is_named(pruned: Any, cache: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made(pruned, cache=cache)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_such_blocks_is_refused(name: str) -> None:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    model = UNet2DModel(8, 1, 1, block_out_channels=(8,), norm_num_groups=4, add_attention=False, **blocks)
    with pytest.raises(ValueError, match="UNet2DModel"):
        sample(model, DDPMScheduler(), torch.zeros(1, 1, 8, 8), steps=2, cache=name)


def test_the_command_line_samples_and_evaluates_with_a_cache(tmp_path: Any) -> None:
    dit().save_pretrained(tmp_path / "model")
    DDPMScheduler().save_pretrained(tmp_path / "model")
    for i in range(4):
        (tmp_path / "images" / str(i)).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 60 * i, np.uint8)).save(tmp_path / "images" / str(i) / "0.png")

    def run(*arguments: Any) -> None:
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == 0, (done.output, done.exception)

    common = ("--n", 2, "--steps", 10, "--cache", "pyramid-attention")
    run("sample", tmp_path / "model", *common, "--out", tmp_path / "samples")
    assert (tmp_path / "samples" / "00001.png").is_file()
    common += ("--images", tmp_path / "images", "--dense", tmp_path / "model", "--held-out", 4, "--seeds", 1)
    run("evaluate", tmp_path / "model", *common, "--batch-sizes", 1, "--out", tmp_path / "found")
    text = (tmp_path / "found" / "evaluation.json").read_text()
    assert json.loads(text)["figures"]["MSE"]["mean"] > 0  # the dense model's own samples are made without a cache


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_a_pipeline_leaves_out_attentions_in_batches_of_other_sizes_too(tmp_path: Any, kind: str) -> None:
    """Both count time from 1 to 0; SD3's class has no caches of its own."""
    made_pipe(kind).save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("a red cat\n")

    def pixels(name: str, n: int, *options: Any) -> np.ndarray:
        words = ["sample", tmp_path / "pipe", "--n", n, "--steps", 6, "--batch-size", 2, "--out", tmp_path / name]
        words += ["--prompts", tmp_path / "prompts.txt", *options]
        done = CliRunner().invoke(app, [str(w) for w in words])
        assert done.exit_code == 0, (done.output, done.exception)
        return np.asarray(Image.open(tmp_path / name / "00000.png")).astype(int)

    dense = pixels("dense", 2)
    cached_one = pixels("cached", 2, "--cache", "pyramid-attention")
    assert not np.array_equal(cached_one, dense)
    assert np.abs(pixels("more", 3, "--cache", "pyramid-attention") - cached_one).max() <= 1
