"""Tables of positions that a pruned model needs for inputs of another size than it was traced with."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from oracle import kept_statistics, masked_dense, randomised
from oracle_zoo import uneven_keep
from torch import Tensor, nn
from zoo_inputs import HEADS, random

import diffprune_fast as dpf
from diffprune_fast.architectures.position_tables import table_of
from diffprune_fast.checkpoint import CheckpointError
from diffprune_fast.checkpoint.manifest import MANIFEST, signed
from diffprune_fast.plan import sliced_shapes
from diffprune_fast.pruned.kept_columns import kept_columns

TEXT = random(2, 7, 24)
TIMES = torch.tensor([3, 500])


def dit(size: tuple[int, int]) -> dict[str, Any]:
    return {"hidden_states": random(2, 4, *size), "timestep": TIMES, "class_labels": torch.tensor([1, 4])}


def pixart(size: tuple[int, int]) -> dict[str, Any]:
    conditions = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return {"hidden_states": random(2, 4, *size), "timestep": TIMES, "encoder_hidden_states": TEXT, **conditions}


def latte(size: tuple[int, int]) -> dict[str, Any]:
    return {"hidden_states": random(2, 4, 3, *size), "timestep": TIMES, "encoder_hidden_states": TEXT}


def cogvideox(size: tuple[int, int]) -> dict[str, Any]:
    return {"hidden_states": random(2, 3, 4, *size), "timestep": TIMES, "encoder_hidden_states": TEXT}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[tuple[int, int]], dict[str, Any]]]] = {
    "DiT": (
        lambda: diffusers.DiTTransformer2DModel(
            **HEADS, out_channels=8, num_layers=1, sample_size=8, num_embeds_ada_norm=10
        ),
        dit,
    ),
    "PixArt": (
        lambda: diffusers.PixArtTransformer2DModel(
            **HEADS, in_channels=4, num_layers=1, cross_attention_dim=32, sample_size=8, caption_channels=24
        ),
        pixart,
    ),
    "Latte": (
        lambda: diffusers.LatteTransformer3DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            sample_size=8,
            caption_channels=24,
            video_length=3,
            patch_size=2,
        ),
        latte,
    ),
    "CogVideoX": (
        lambda: diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=24,
            num_layers=1,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            max_text_seq_length=7,
        ),
        cogvideox,
    ),
}
TRACED, OTHER, SQUARE = (8, 8), (12, 4), (12, 12)


def table_module(model: nn.Module) -> tuple[str, nn.Module]:
    return next((n, m) for n, m in model.named_modules() if table_of(m) is not None)


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def pruned(name: str) -> tuple[nn.Module, nn.Module, dpf.PruneResult]:
    """The masked dense model, whose tables of any size are masked too, the pruned one and its result."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = randomised(make())
    plan = dpf.trace(model, inputs(TRACED))
    keep = uneven_keep(plan, 0.3, 0)
    dense = masked_dense(model, plan, keep)
    path, module = table_module(dense)
    columns = sliced_shapes(model, plan, keep).kept[f"{path}.{table_of(module).buffer}", 2]  # type: ignore[union-attr]
    mask = torch.zeros(plan.shapes[f"{path}.proj.weight"][0], dtype=torch.float64)
    mask[torch.from_numpy(columns)] = 1
    module.register_forward_hook(lambda m, i, out: out * mask)
    return dense, model, dpf.prune(model, plan, keep, example_inputs=inputs(TRACED))


@pytest.mark.parametrize("size", [TRACED, OTHER, SQUARE], ids=["traced size", "other size", "other square"])
@pytest.mark.parametrize("name", MODELS)
def test_oracle_sliced_model_equals_masked_model_at_other_sizes(name: str, size: tuple[int, int]) -> None:
    if (name, size) == ("DiT", OTHER):
        pytest.skip("DiT takes squares only")
    dense, model, _ = pruned(name)
    inputs = MODELS[name][1](size)
    with kept_statistics("count"):
        want = run(dense, inputs)
    assert (run(model, inputs) - want).abs().max() <= 1e-9 * want.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_tables_survive_copies_and_checkpoints(name: str, tmp_path: Path) -> None:
    _, model, result = pruned(name)
    inputs = MODELS[name][1]
    result.save_pretrained(tmp_path)
    loaded = dpf.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    models = [loaded, dpf.from_pretrained(tmp_path / "again"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for size in (SQUARE, TRACED):
        want = run(model, inputs(size))
        for other in models:
            torch.testing.assert_close(run(other, inputs(size)), want)


def test_module_is_as_before_after_a_call_of_another_size() -> None:
    _, model, _ = pruned("PixArt")
    _, module = table_module(model)
    before, table = (module.height, module.width), module.pos_embed
    run(model, pixart(OTHER))
    assert (module.height, module.width) == before
    assert module.pos_embed is table
    with pytest.raises(RuntimeError, match="expected input"):
        module(random(2, 3, 12, 12))
    assert module.pos_embed is table


def test_tables_of_a_model_that_is_pruned_twice() -> None:
    _, model, _ = pruned("DiT")
    path, module = table_module(model)
    first = kept_columns(model)[path].kept
    plan = dpf.trace(model, dit(TRACED))
    dpf.prune(model, plan, uneven_keep(plan, 0.3, 1), example_inputs=dit(TRACED))
    columns = kept_columns(model)[path]
    assert columns.width == 32
    assert set(columns.kept.tolist()) < set(first.tolist())
    fresh = MODELS["DiT"][0]().double()
    _, full = table_module(fresh)
    x = random(2, 4, 12, 4)
    bias = module.proj.bias.detach().clone()
    with torch.no_grad():
        module.proj.weight.zero_()
        full.proj.weight.zero_()
        full.proj.bias.zero_()
        assert torch.allclose(module(x), full(x)[..., columns.kept] + bias, rtol=0, atol=1e-6)


def test_plan_is_the_same_at_another_size() -> None:
    make, inputs = MODELS["PixArt"]
    plans = [dpf.trace(make(), inputs(size)) for size in (TRACED, OTHER)]
    assert [(g.name, g.n_units, [m.place for m in g.members]) for g in plans[0].groups] == [
        (g.name, g.n_units, [m.place for m in g.members]) for g in plans[1].groups
    ]


@pytest.mark.parametrize("entry", [[32, [0, 99]], [32], [32, ["a"]], [2, [0, 20]]])
def test_wrong_tables_in_a_manifest_are_refused(entry: Any, tmp_path: Path) -> None:
    import json

    _, model, result = pruned("DiT")
    result.save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert list(manifest["tables"]) == [table_module(model)[0]]
    manifest["tables"] = dict.fromkeys(manifest["tables"], entry)
    (tmp_path / MANIFEST).write_text(json.dumps(signed(manifest)))
    with pytest.raises(CheckpointError, match="table"):
        dpf.from_pretrained(tmp_path)
    manifest["tables"] = {"nowhere": [32, [0, 20]]}
    (tmp_path / MANIFEST).write_text(json.dumps(signed(manifest)))
    with pytest.raises(CheckpointError, match="nowhere"):
        dpf.from_pretrained(tmp_path)


def test_models_without_such_tables_get_no_hooks() -> None:
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
    )
    plan = dpf.trace(model)
    dpf.prune(model, plan, dpf.select(plan, np.random.default_rng(0).random(plan.n_units)).keep)
    assert not kept_columns(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
