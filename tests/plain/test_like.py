"""``like=``: a smaller config's widths, kept by the best units; the result is a plain model of the class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from models import Case, cifar_unet, small_condition_unet, small_unet, small_vae
from torch import Tensor
from zoo import ZOO

import diffprune_fast as dpf
from diffprune_fast.checkpoint.manifest import CONFIG, MANIFEST
from diffprune_fast.plain.sinusoids import frequencies, solve
from diffprune_fast.plain.target import target_of
from diffprune_fast.selection.budgets import BudgetError

BY_NAME = {case.name: case for case in ZOO}
QUICK: dict[str, Any] = {"criterion": "magnitude"}
TRANSFORMERS = {
    "DiTTransformer2DModel": [{"num_attention_heads": 3}, {"attention_head_dim": 4}],
    "PixArtTransformer2DModel": [
        {"num_attention_heads": 2, "cross_attention_dim": 24},
        {"attention_head_dim": 6, "cross_attention_dim": 24},
    ],
    "SD3Transformer2DModel-3": [
        {"num_attention_heads": 3, "caption_projection_dim": 24},
        {"attention_head_dim": 4, "caption_projection_dim": 16},
    ],
    "SD3Transformer2DModel-3.5": [{"num_attention_heads": 2, "caption_projection_dim": 16}],
    "FluxTransformer2DModel": [{"num_attention_heads": 3}],
}


def images(n: int = 4, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(16, 3, size, size, generator=generator) * 2 - 1 for _ in range(n)]


def made(case: Case) -> Any:
    torch.manual_seed(0)
    return case.make().double().eval()


def assert_plain(model: Any, directory: Path, run: Any) -> Any:
    """The class's own loader gives the same outputs; so does a config without our manifest beside it."""
    (directory / MANIFEST).unlink()
    own, info = type(model).from_pretrained(directory, output_loading_info=True, torch_dtype=torch.float64)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    torch.testing.assert_close(run(own.eval()), run(model), rtol=1e-9, atol=1e-9)
    return own


@pytest.mark.parametrize(("name", "like"), [(name, like) for name, some in TRANSFORMERS.items() for like in some])
def test_a_transformer_like_a_config_is_of_that_config(name: str, like: dict[str, Any], tmp_path: Path) -> None:
    case = BY_NAME[name]
    model = made(case)
    result = dpf.score_and_prune(model, None, like=like, example_inputs=case.example_inputs, **QUICK)
    result.save_pretrained(tmp_path)
    own = assert_plain(model, tmp_path, lambda m: case.run(m).detach())
    assert own.num_parameters() == result.after.params
    assert {key: own.config[key] for key in like} == like


@pytest.mark.parametrize(
    ("make", "like"),
    [
        (small_unet, {"block_out_channels": (16, 48, 48)}),
        (lambda: small_unet(attention_head_dim=None), {"block_out_channels": (24, 40, 40)}),
        (small_unet, {"block_out_channels": (16, 32, 32), "attention_head_dim": 4}),
        (small_condition_unet, {"block_out_channels": (16, 48)}),
        (lambda: small_condition_unet(attention_head_dim=(4, 8)), {"block_out_channels": (24, 40)}),
        (small_vae, {"block_out_channels": (24, 48)}),
    ],
)
def test_a_unet_or_autoencoder_like_a_config_is_of_that_config(make: Any, like: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    result = dpf.score_and_prune(model, None, like=like, **QUICK)
    result.save_pretrained(tmp_path)

    def run(m: Any) -> Tensor:
        x = torch.randn(2, m.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(3)).double()
        with torch.no_grad():
            if isinstance(m, diffusers.AutoencoderKL):
                return m(x).sample
            text = (torch.ones(2, 5, 24).double(),) if isinstance(m, diffusers.UNet2DConditionModel) else ()
            return m(x, 7, *text).sample

    own = assert_plain(model, tmp_path, run)
    assert own.num_parameters() == result.after.params
    assert dpf.trace(own).complexity() == result.after
    assert tuple(own.config.block_out_channels) == like["block_out_channels"]


def test_the_papers_operating_point_is_a_plain_config() -> None:
    model = cifar_unet()
    result = dpf.score_and_prune(model, None, like={"block_out_channels": (96, 192, 192, 192)}, **QUICK)
    assert f"{result.after.params / 1e6:.2f}" == "20.12"
    assert f"{result.after.macs / 1e9:.2f}" == "3.41"
    assert model.config.block_out_channels == (96, 192, 192, 192)
    assert cifar_unet(**{"block_out_channels": (96, 192, 192, 192)}).num_parameters() == model.num_parameters()


def test_it_is_compensated_in_place_and_on_a_copy_alike() -> None:
    like = {"block_out_channels": (16, 48, 48)}
    quick: dict[str, Any] = {"like": like, "max_samples": 32, "progress": False}
    torch.manual_seed(0)
    model = small_unet().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    apart = dpf.score_and_prune(model, images(), inplace=False, **quick)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.config.block_out_channels == (32, 64, 64)
    held = dict(model.named_parameters())
    within = dpf.score_and_prune(model, images(), **quick)
    assert within.model is model
    assert all(p is held[name] for name, p in model.named_parameters())
    assert within.compensation is not None
    assert within.compensation.helped
    for name, want in apart.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], want, rtol=1e-4, atol=1e-4)


def test_the_units_with_the_highest_scores_stay() -> None:
    torch.manual_seed(0)
    model = small_unet().eval()
    best = [1, 3, 4, 6, 8, 11, 12, 13, 17, 18, 20, 23, 26, 27, 29, 30]  # two of each norm group's four
    plan = dpf.trace(model, units="heads")
    values = np.random.default_rng(0).random(plan.n_units)
    first = plan.offsets[plan.position["down_blocks.0.resnets.0.conv1"]]
    values[first + np.array(best)] += 1
    result = dpf.select(plan, values, counts={"down_blocks.0.resnets.0.conv1": 16})
    assert result.keep["down_blocks.0.resnets.0.conv1"].tolist() == best


@pytest.mark.parametrize("width", [96, 64])
def test_the_time_embedding_says_what_it_said(width: int) -> None:
    """The sinusoids of a narrower first level: some of the same frequencies, and a reader that is solved for them."""
    torch.manual_seed(0)
    dense, pruned = cifar_unet().eval(), cifar_unet().eval()
    pruned.load_state_dict(dense.state_dict())
    updates = {"block_out_channels": (width, 256, 256, 256)}
    target = target_of(pruned, {**updates, **frequencies(pruned, updates, 1000)})
    steps = torch.arange(1000)
    reader, sinusoids = pruned.time_embedding.linear_1, target.fresh.time_proj
    assert sinusoids.num_channels == width
    with torch.no_grad():
        solve(reader, pruned.time_proj, sinusoids, 1000)
        found, said = reader(sinusoids(steps)), dense.time_embedding.linear_1(dense.time_proj(steps))
    torch.testing.assert_close(found, said, rtol=0, atol=2e-3)


def test_a_whole_config_keeps_its_frequencies() -> None:
    narrow, model = small_unet(block_out_channels=(16, 48, 48)), small_unet()
    dpf.score_and_prune(model, None, like=narrow, **QUICK)
    assert model.config.freq_shift == 0
    part = small_unet()
    dpf.score_and_prune(part, None, like={"block_out_channels": (24, 48, 48)}, **QUICK)
    assert part.config.freq_shift == part.time_proj.downscale_freq_shift < 0


@pytest.mark.parametrize(
    ("like", "says"),
    [
        ({"block_out_channels": (40, 64, 64)}, "conv_in.weight would have 40 channels along dim 0 and has 32"),
        ({"layers_per_block": 2}, r"also has 'down_blocks.0.resnets.1.*drop_blocks"),
        ({"block_out_channels": (32, 64)}, "can't be built so"),
        (
            {"norm_num_groups": 4, "block_out_channels": (16, 64, 64)},
            "num_groups would be 4, and pruning leaves it at 8",
        ),
        ({"block_out_channels": (30, 64, 64)}, "can't be built so"),
        ({"block_out_channels": (16, 48, 32)}, "also has 'down_blocks.2.resnets.0.conv_shortcut.bias'"),
        ({"attention_head_dim": 16}, r"heads would be 4, and pruning leaves it at 8|can't be reached"),
    ],
)
def test_what_cannot_be_reached_is_named_and_nothing_changes(like: dict[str, Any], says: str) -> None:
    torch.manual_seed(0)
    model = small_unet()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(BudgetError, match=says):
        dpf.score_and_prune(model, None, like=like, **QUICK)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.config.block_out_channels == (32, 64, 64)


def test_a_config_can_be_a_model_a_file_or_a_folder(tmp_path: Path) -> None:
    narrow = small_unet(block_out_channels=(16, 48, 48))
    narrow.save_config(tmp_path)
    sizes = [
        dpf.score_and_prune(small_unet(), None, like=like, **QUICK).after.params
        for like in (narrow, tmp_path, str(tmp_path / CONFIG), json.loads((tmp_path / CONFIG).read_text()))
    ]
    assert sizes == [narrow.num_parameters()] * 4


@pytest.mark.parametrize(
    ("like", "error", "says"),
    [
        ({"block_out_chanels": (16,)}, ValueError, "is it 'block_out_channels'"),
        ({"block_out_channels": (32, 64, 64)}, ValueError, "nothing to remove"),
        ({"_class_name": "AutoencoderKL"}, ValueError, "the config of a AutoencoderKL"),
        (0.5, TypeError, "not float"),
        ("nowhere", ValueError, "no such file"),
    ],
)
def test_what_is_no_config_is_named(like: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        dpf.score_and_prune(small_unet(), None, like=like, **QUICK)


@pytest.mark.parametrize("more", [{"macs": 0.5}, {"ignore": ["conv_in*"]}])
def test_a_config_leaves_no_room_for_other_wishes(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="gives every width: leave out"):
        dpf.score_and_prune(small_unet(), None, like={"block_out_channels": (16, 48, 48)}, **more, **QUICK)


def test_an_optimizer_cannot_follow_other_sinusoids() -> None:
    model = small_unet()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="other sinusoids"):
        dpf.score_and_prune(model, None, like={"block_out_channels": (16, 48, 48)}, optimizer=optimizer, **QUICK)
    dpf.score_and_prune(model, None, like={"block_out_channels": (32, 48, 48)}, optimizer=optimizer, **QUICK)
    assert model(torch.zeros(1, 3, 16, 16), 3).sample.shape == (1, 3, 16, 16)
