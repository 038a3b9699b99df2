"""Saving and loading pruned models."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from models import Transformer
from random_plans import chain
from torch import nn

from diffprune_fast import from_pretrained
from diffprune_fast.checkpoint import CheckpointError, save
from diffprune_fast.checkpoint.loading import diffusers_class
from diffprune_fast.checkpoint.manifest import (
    BUFFERS,
    CONFIG,
    MANIFEST,
    PRUNED_WEIGHTS,
    SIGNPOST,
    WEIGHTS,
    pack_runs,
    read_manifest,
    signed,
    unpack_runs,
)
from diffprune_fast.plan import Complexity
from diffprune_fast.result import PruneResult, record
from diffprune_fast.selection import select
from diffprune_fast.slicing import prune
from diffprune_fast.tracing import trace

IDS = (torch.arange(12)[None],)
SMALL = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
}


def result_of(model, **known):
    plan = chain([16, 8], [])
    cost = Complexity(1000, 2000)
    return PruneResult(model, plan, {"layer0": np.array([0, 1, 2, 7])}, cost, cost, seed=3, **known)


def prune_by(model, **asked):
    """Prune by random scores."""
    plan = trace(model)
    chosen = select(plan, np.random.default_rng(0).random(plan.n_units), **asked)
    return prune(model, plan, chosen.keep, norm_groups=chosen.norm_groups)


def narrow(layer, dim, keep):
    """Cut a parameter of a layer by hand, as slicing does."""
    weight = layer.weight
    layer.weight = nn.Parameter(weight.detach().index_select(dim, keep).contiguous())
    if dim == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[keep])


@pytest.fixture
def uneven():
    """A UNet2DModel whose first ResNet is 12 channels wide inside, in place of 16."""
    torch.manual_seed(0)
    model = UNet2DModel(**SMALL).eval()
    resnet, keep = model.down_blocks[0].resnets[0], torch.tensor([0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14])
    for layer in (resnet.conv1, resnet.time_emb_proj, resnet.norm2):
        narrow(layer, 0, keep)
    narrow(resnet.conv2, 1, keep)
    resnet.conv1.out_channels = resnet.time_emb_proj.out_features = resnet.norm2.num_channels = 12
    resnet.conv2.in_channels = 12
    return model


@pytest.fixture
def saved(uneven, tmp_path):
    save(record(result_of(uneven)).model, tmp_path / "pruned")
    return tmp_path / "pruned"


def assert_same_model(one, two):
    a, b = one.state_dict(), two.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def assert_same_function(one, two, call=None):
    """Equal weights to the bit, equal outputs to rounding: libraries choose kernels by address and threads."""
    assert_same_model(one, two)
    call = call or run
    torch.testing.assert_close(call(one), call(two))


def run(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8), 10).sample


def edit(directory, change):
    """Change a manifest, and sign it anew."""
    path = directory / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(signed(manifest)))


def edit_config(directory, **changes):
    """Change a config, and note its checksum anew."""
    path = directory / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(directory, lambda m: m["sha256"].update({CONFIG: digest}))


def test_round_trip_is_exact_to_the_bit(uneven, saved):
    loaded = from_pretrained(saved)
    assert_same_function(uneven, loaded)
    assert loaded.down_blocks[0].resnets[0].conv2.in_channels == 12
    assert not loaded.training
    assert sorted(p.name for p in saved.iterdir()) == sorted([CONFIG, PRUNED_WEIGHTS, MANIFEST, SIGNPOST])


def test_a_loaded_model_can_be_saved_again(uneven, saved, tmp_path):
    save(record(result_of(from_pretrained(saved))).model, tmp_path / "again")
    assert_same_model(uneven, from_pretrained(tmp_path / "again"))


def test_saving_twice_replaces_the_first(uneven, saved):
    with torch.no_grad():
        uneven.conv_in.weight.add_(1)
    save(record(result_of(uneven)).model, saved)
    assert_same_model(uneven, from_pretrained(saved))


def test_whoever_may_read_the_manifest_may_read_the_weights(saved):
    assert len({p.stat().st_mode for p in saved.iterdir()}) == 1


def test_half_precision_is_kept_and_can_be_asked_for(uneven, saved, tmp_path):
    assert from_pretrained(saved, torch_dtype=torch.float16).conv_in.weight.dtype == torch.float16
    save(record(result_of(uneven.to(torch.bfloat16))).model, tmp_path / "half")
    assert_same_model(uneven, from_pretrained(tmp_path / "half"))


def test_the_manifest_tells_how_the_model_came_to_be(saved):
    manifest = read_manifest(saved)
    assert manifest["seed"] == 3
    assert manifest["plan"] == chain([16, 8], []).hash
    assert manifest["keep"]["layer0"].tolist() == [0, 1, 2, 7]
    assert manifest["before"] == {"params": 1000, "macs": 2000}
    assert set(manifest["versions"]) == {"diffprune_fast", "torch", "diffusers"}
    assert manifest["plain_config"] is False


@pytest.mark.parametrize(
    ("cls", "large", "small"),
    [
        (UNet2DModel, SMALL, {"block_out_channels": (12, 24)}),
        (UNet2DModel, {**SMALL, "attention_head_dim": 8}, {"block_out_channels": (8, 16), "attention_head_dim": 4}),
        (
            UNet2DConditionModel,
            {
                "sample_size": 8,
                "block_out_channels": (16, 32),
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "cross_attention_dim": 8,
                "attention_head_dim": 2,
            },
            {"block_out_channels": (8, 16), "time_embedding_dim": 40},
        ),
        (
            AutoencoderKL,
            {
                "block_out_channels": (16, 32),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "norm_num_groups": 4,
                "sample_size": 8,
            },
            {"block_out_channels": (8, 16)},
        ),
    ],
)
def test_an_evenly_pruned_model_loads_with_its_own_class(cls, large, small, tmp_path):
    model = cls(**{**large, **small}).eval()
    model.register_to_config(**{k: cls(**large).config[k] for k in small})  # slicing leaves the config as it was
    save(record(result_of(model)).model, tmp_path)
    own, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_model(model, own)
    assert_same_model(model, from_pretrained(tmp_path))
    config = json.loads((tmp_path / CONFIG).read_text())
    assert {k: config[k] for k in small} == {k: list(v) if isinstance(v, tuple) else v for k, v in small.items()}


def test_equal_shapes_with_other_heads_are_no_plain_config(tmp_path):
    model = UNet2DModel(**{**SMALL, "block_out_channels": (12, 24)})
    model.register_to_config(block_out_channels=SMALL["block_out_channels"])
    model.mid_block.attentions[0].heads = 2
    save(record(result_of(model)).model, tmp_path)
    assert read_manifest(tmp_path)["plain_config"] is False
    assert from_pretrained(tmp_path).mid_block.attentions[0].heads == 2


class Tied(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)
        self.b.weight = self.a.weight
        self.register_buffer("table", torch.arange(width, dtype=torch.float32), persistent=False)
        self.norm = nn.BatchNorm1d(width)


def test_tied_weights_and_unsaved_buffers_of_other_classes(tmp_path):
    pruned = Tied(4)
    pruned.table = torch.tensor([5.0, 3, 2, 1])
    changed = {"a.in_features": 4, "a.out_features": 4, "b.in_features": 4, "b.out_features": 4, "norm.num_features": 4}
    save(record(result_of(pruned, attributes=changed)).model, tmp_path)
    assert (tmp_path / BUFFERS).exists()
    assert not (tmp_path / CONFIG).exists()
    unpruned = Tied()
    loaded = from_pretrained(tmp_path, unpruned)
    assert loaded.a.weight is loaded.b.weight
    assert loaded.table.tolist() == [5, 3, 2, 1]
    assert_same_model(pruned, loaded)
    assert (loaded.a.in_features, unpruned.a.in_features) == (4, 6)
    assert loaded.norm.num_features == 4
    with pytest.raises(CheckpointError, match=r"pass model=, an unpruned Tied"):
        from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a Tied, the given model is a Linear"):
        from_pretrained(tmp_path, nn.Linear(2, 2))


def test_an_evenly_pruned_autoencoder_is_saved_as_a_narrower_one(tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=4, sample_size=16, **blocks).eval()
    result = prune_by(model, ratio=0.25, round_to=1, ignore=["quant_conv.weight", "post_quant_conv.weight"])
    result.save_pretrained(tmp_path)
    own = AutoencoderKL.from_pretrained(tmp_path)
    assert own.config.block_out_channels == [12, 24]
    image = torch.linspace(-1, 1, 3 * 256).reshape(1, 3, 16, 16)
    with torch.no_grad():
        assert_same_function(own, model, lambda m: m(image).sample)


def test_a_unet_pruned_evenly_below_its_first_level_is_saved_as_a_narrower_one(tmp_path):
    """The first level stays: the sinusoids of its width feed the time embedding and are not pruned."""
    torch.manual_seed(0)
    model = UNet2DModel(**{**SMALL, "attention_head_dim": 8}).eval()
    plan = trace(model)
    first = [g.name for g in plan.groups if g.n_units in (16, 64)]
    prune_by(model, ratio=0.25, ignore=first).save_pretrained(tmp_path)
    own = UNet2DModel.from_pretrained(tmp_path)
    assert own.config.block_out_channels == [16, 24]
    assert own.config.attention_head_dim == 6
    assert_same_function(own, model)


def test_a_unet_pruned_unevenly_keeps_its_config(tmp_path):
    torch.manual_seed(0)
    model = UNet2DModel(**SMALL).eval()
    result = prune_by(model, ratio=0.4, norm_groups="exact", round_to=1, ranking="global")
    result.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert_same_function(loaded, model)
    assert read_manifest(tmp_path)["keep"].keys() == result.keep.keys()
    assert json.loads((tmp_path / CONFIG).read_text())["block_out_channels"] == [16, 32]


def test_a_pruned_model_can_be_loaded_pruned_again_and_saved(tmp_path):
    torch.manual_seed(0)
    prune_by(UNet2DModel(**SMALL), ratio=0.25, round_to=1).save_pretrained(tmp_path / "once")
    model = from_pretrained(tmp_path / "once")
    prune_by(model, ratio=0.3, round_to=1).save_pretrained(tmp_path / "twice")
    assert_same_function(from_pretrained(tmp_path / "twice"), model)


@pytest.mark.parametrize("name", [PRUNED_WEIGHTS, MANIFEST, CONFIG])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        from_pretrained(saved)


@pytest.mark.parametrize("name", [PRUNED_WEIGHTS, MANIFEST, CONFIG])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_named(saved, name, share):
    path = saved / name
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=name):
        from_pretrained(saved)


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False, "ignore_mismatched_sizes": True}])
def test_diffusers_names_the_function_that_loads_what_no_config_describes(saved, options):
    with pytest.raises(OSError, match=r"load this folder with diffprune_fast\.from_pretrained"):
        UNet2DModel.from_pretrained(saved, **options)
    assert "diffprune_fast.from_pretrained" in json.loads((saved / CONFIG).read_text())["_diffprune_fast"]


def test_checkpoints_with_the_weights_under_their_former_name_still_load(uneven, saved):
    (saved / PRUNED_WEIGHTS).rename(saved / WEIGHTS)
    (saved / SIGNPOST).unlink()
    edit(saved, lambda m: m["sha256"].update({WEIGHTS: m["sha256"].pop(PRUNED_WEIGHTS)}))
    assert_same_function(uneven, from_pretrained(saved))


def test_a_plain_model_in_the_place_of_another_leaves_no_signpost(saved):
    plain = UNet2DModel(**SMALL).eval()
    save(record(result_of(plain)).model, saved)
    assert sorted(p.name for p in saved.iterdir()) == sorted([CONFIG, WEIGHTS, MANIFEST])
    assert_same_model(plain, UNet2DModel.from_pretrained(saved))


def test_a_pickle_is_not_opened(saved):
    (saved / PRUNED_WEIGHTS).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        from_pretrained(saved)


def test_other_weights_of_the_same_shapes_are_refused_unless_wanted(uneven, saved, tmp_path):
    with torch.no_grad():
        uneven.conv_in.weight.add_(1)
    save(record(result_of(uneven)).model, tmp_path / "other")
    (saved / PRUNED_WEIGHTS).write_bytes((tmp_path / "other" / PRUNED_WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match=r"SHA-256 differs.*verify=False"):
        from_pretrained(saved)
    assert_same_model(uneven, from_pretrained(saved, verify=False))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(format=99), "has format 99"),
        (lambda m: m.pop("shapes"), "'shapes' is missing"),
        (lambda m: m.update(keep=[]), "'keep' is missing or not a dict"),
        (lambda m: m["keep"].update(layer0=[5, 2]), "keep-sets can't be read"),
        (lambda m: m["keep"].update(layer0=[0, 2**40]), "more units than there are channels"),
        (lambda m: m["shapes"].pop("conv_in.weight"), "the weights also hold 'conv_in.weight'"),
        (lambda m: m["shapes"].update({"x.weight": [1]}), "the weights lack 'x.weight'"),
        (lambda m: m["shapes"].update({"conv_in.bias": [15]}), r"conv_in.bias is \(16,\) in the weights and \(15,\)"),
        (lambda m: m["shapes"].update({"conv_in.bias": ["16"]}), "not a list of sizes"),
        (lambda m: m["attributes"].update({"nowhere.heads": 1}), "has no module 'nowhere'"),
        (lambda m: m["attributes"].update({"conv_in.forward": 1}), "which follows no width in Conv2d"),
        (lambda m: m["attributes"].update({"conv_in._parameters": 1}), "which follows no width"),
        (lambda m: m["attributes"].update({"conv_in.groups": "1"}), "only numbers and tuples"),
        (lambda m: m["attributes"].update({"conv_in.groups": [1, "2"]}), "only numbers and tuples"),
        (lambda m: m.update(model_class="AutoencoderKL"), "is not the config of a AutoencoderKL"),
    ],
)
def test_a_contradictory_manifest_is_refused(saved, change, says):
    edit(saved, change)
    with pytest.raises(CheckpointError, match=says):
        from_pretrained(saved)


def test_shapes_larger_than_the_class_are_refused(saved):
    edit_config(saved, block_out_channels=[8, 32])
    with pytest.raises(CheckpointError, match="the unpruned model has"):
        from_pretrained(saved)


def test_another_structure_is_refused(saved):
    edit_config(saved, layers_per_block=2)
    with pytest.raises(CheckpointError, match=r"UNet2DModel also has .* saved with \{.*'diffusers'"):
        from_pretrained(saved)


@pytest.mark.parametrize("name", ["os.system", "DDPMScheduler", "nothing", "_private", "models", 3, None])
def test_only_models_of_diffusers_are_built_by_name(name):
    with pytest.raises(CheckpointError, match="is not a model of diffusers"):
        diffusers_class(name)


def test_a_save_that_fails_leaves_the_former_checkpoint(uneven, saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("diffprune_fast.checkpoint.saving.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(record(result_of(uneven)).model, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_model_without_weights_is_refused(tmp_path):
    with torch.device("meta"):
        model = UNet2DModel(**SMALL)
    with pytest.raises(CheckpointError, match="on the meta device"):
        save(record(result_of(model)).model, tmp_path)


@pytest.mark.parametrize("units", [[], [0], [3, 4, 5], [0, 2, 3, 9], list(range(0, 20, 2))])
def test_runs_hold_any_keep_set(units):
    assert unpack_runs(pack_runs(np.array(units, np.int64))).tolist() == units


@pytest.mark.parametrize("runs", [[0], [3, 3], [0, 2, 1, 4], [-1, 2], [0, 2.5], "ab", [0, 2**40], [True, 2]])
def test_runs_that_do_not_rise_are_refused(runs):
    with pytest.raises(ValueError, match="runs"):
        unpack_runs(runs)


def test_diffusers_own_save_pretrained_writes_the_pruned_model(tmp_path):
    torch.manual_seed(0)
    result = prune_by(UNet2DModel(**SMALL).eval(), ratio=0.4)
    model = result.model
    for i, trained in enumerate([model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]):
        trained.save_pretrained(tmp_path / str(i))
        loaded = from_pretrained(tmp_path / str(i))
        assert_same_function(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_function(from_pretrained(tmp_path / "again"), model)
    copied = copy.deepcopy(model)
    copied.conv_in.weight.data.zero_()
    copied.save_pretrained(tmp_path / "zeros")  # its own weights, not those of the model it was copied from
    assert not from_pretrained(tmp_path / "zeros").conv_in.weight.any()
    with pytest.raises(ValueError, match=r"saved as safetensors, without \{'safe_serialization'\}"):
        model.save_pretrained(tmp_path / "pickled", safe_serialization=False)


def pruned_transformer(directory, **settings):
    torch.manual_seed(0)
    model = Transformer(**settings)
    plan = trace(model, IDS)
    chosen = select(plan, np.random.default_rng(0).random(plan.n_units), ratio=0.5, round_to=1)
    prune(model, plan, chosen.keep, example_inputs=IDS).save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    ("settings", "says"), [({"heads": 8}, r"heads is 8, it was 4"), ({"dim": 64}, r"is \(.*64.*\), it was \(.*32.*\)")]
)
def test_an_instance_of_another_architecture_is_refused(settings, says, tmp_path):
    model = pruned_transformer(tmp_path)
    with pytest.raises(CheckpointError, match=f"the given Transformer is not the model that was pruned: its .*{says}"):
        from_pretrained(tmp_path, Transformer(**settings))
    assert_same_function(from_pretrained(tmp_path, Transformer()), model, lambda m: m(*IDS))


def test_a_plain_module_pruned_twice_loads_into_the_unpruned_one(tmp_path):
    model = pruned_transformer(tmp_path / "once")
    for again in (model, from_pretrained(tmp_path / "once", Transformer())):
        plan = trace(again, IDS)
        keep = {plan.groups[0].name: np.arange(plan.groups[0].n_units - 1)}
        prune(again, plan, keep, example_inputs=IDS).save_pretrained(tmp_path / "twice")
        loaded = from_pretrained(tmp_path / "twice", Transformer())
        assert_same_function(loaded, again, lambda m: m(*IDS))
        widths = [(m.in_features, m.out_features) for m in loaded.modules() if isinstance(m, nn.Linear)]
        assert widths == [(m.weight.shape[1], m.weight.shape[0]) for m in loaded.modules() if isinstance(m, nn.Linear)]


def test_loaded_weights_lie_where_pytorch_would_put_them(tmp_path):
    """In the file they begin anywhere, some at 4 bytes after a boundary."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3))
    plan = trace(model, (torch.zeros(2, 3),))
    result = prune(model, plan, {"0": np.array([0, 2, 3])}, example_inputs=(torch.zeros(2, 3),))
    result.save_pretrained(tmp_path)
    dense = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3))
    loaded = from_pretrained(tmp_path, dense)
    assert {t.data_ptr() % 64 for t in (*loaded.parameters(), *loaded.buffers())} == {0}
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
