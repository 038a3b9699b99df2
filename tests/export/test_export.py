"""A pruned model is an ordinary module: what exports, compiles and caches models takes it, with the same outputs."""

from __future__ import annotations

import copy
import io
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from models import small_condition_unet, small_unet
from torch import Tensor, nn
from zoo import ZOO

import diffprune_fast as dpf

FREE: dict[str, Any] = {"macs": 0.5, "round_to": 4}
LIKE: dict[str, Any] = {"like": {"block_out_channels": (16, 48, 48)}}


class Denoiser(nn.Module):
    """What is exported: tensors in, one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t, return_dict=False)[0]


@pytest.fixture(scope="module", params=[FREE, LIKE], ids=["free", "like"])
def pruned(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = small_unet().eval()
    dpf.score_and_prune(model, None, criterion="random", **request.param)
    return Denoiser(model).eval().requires_grad_(False)


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
    return x, torch.arange(batch) * 37 + 1


def assert_same(found: Any, pruned: nn.Module, batch: int) -> None:
    with torch.no_grad():
        want = pruned(*inputs(batch))
    torch.testing.assert_close(torch.as_tensor(found), want, rtol=1e-3, atol=1e-4)


def test_torch_export_with_a_dynamic_batch(pruned: nn.Module) -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(pruned, inputs(2), dynamic_shapes=({0: batch}, {0: batch}))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (2, 5):
        assert_same(loaded(*inputs(n)), pruned, n)


def test_torch_jit_trace(pruned: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(pruned, inputs(2))
    assert_same(traced(*inputs(2)), pruned, 2)
    assert_same(traced(*inputs(3)), pruned, 3)


@pytest.mark.slow
def test_torch_compile(pruned: nn.Module) -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(torch.compile(pruned, backend="aot_eager")(*inputs(2)), pruned, 2)


def _onnx(file: Path, batch: int) -> np.ndarray:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return session.run(None, dict(zip(names, [x.numpy() for x in inputs(batch)])))[0]


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx(pruned: nn.Module, dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    file = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=8)
    shapes: dict[str, Any] = {"dynamic_shapes": ({0: batch}, {0: batch})} if dynamo else {}
    axes: dict[str, Any] = {} if dynamo else {"dynamic_axes": {"x": {0: "n"}, "t": {0: "n"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            pruned, inputs(2), str(file), input_names=["x", "t"], dynamo=dynamo, opset_version=18, **shapes, **axes
        )
    for n in (2, 5):
        assert_same(_onnx(file, n), pruned, n)


def test_openvino(pruned: nn.Module) -> None:
    openvino = pytest.importorskip("openvino")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(pruned, example_input=inputs(2))
    # in f32 on processors that would take bf16 by themselves, too
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for n in (2, 5):
        assert_same(compiled([x.numpy() for x in inputs(n)])[0], pruned, n)


def test_torchao_weights_of_eight_bits(pruned: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao = pytest.importorskip("torchao.quantization")
        model: Any = copy.deepcopy(pruned)
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    attention = model.model.mid_block.attentions[0]
    assert type(attention.to_q.weight.data) is not Tensor
    with torch.no_grad():
        found, want = model(*inputs(2)), pruned(*inputs(2))
    torch.testing.assert_close(found, want, rtol=0.05, atol=0.05)


def test_sharded_safetensors_of_a_plain_result(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small_unet().eval()
    dpf.score_and_prune(model, None, criterion="random", **LIKE)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("diffusion_pytorch_model-*.safetensors"))) > 1
    own = UNet2DModel.from_pretrained(tmp_path)
    assert_same(Denoiser(own)(*inputs(2)).detach(), Denoiser(model), 2)


def test_sharded_safetensors_of_what_no_config_describes(tmp_path: Path) -> None:
    model = small_unet()
    dpf.score_and_prune(model, None, criterion="random", **FREE)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("diffprune_model-*.safetensors"))) > 1
    found = dpf.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), model.parameters(), strict=True))


def test_first_block_cache_hooks_of_diffusers() -> None:
    """With a threshold of 0 nothing is skipped, so that the hooked model answers as the one without hooks."""
    hooks = pytest.importorskip("diffusers.hooks")
    case = next(c for c in ZOO if c.name == "FluxTransformer2DModel")
    torch.manual_seed(0)
    model: Any = case.make().double().eval()
    dpf.score_and_prune(
        model, None, criterion="random", like={"num_attention_heads": 3}, example_inputs=case.example_inputs
    )
    with torch.no_grad():
        want = case.run(copy.deepcopy(model))
        hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=0.0))
        with model.cache_context("test") if hasattr(model, "cache_context") else warnings.catch_warnings():
            found = case.run(model)
    torch.testing.assert_close(found, want)


def test_layerwise_casting_of_a_condition_unet() -> None:
    torch.manual_seed(0)
    model = small_condition_unet().eval()
    dpf.score_and_prune(model, None, criterion="random", ratio=0.3, round_to=4)
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 24)
    with torch.no_grad():
        want = model(x, 5, text).sample
        model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
        found = model(x, 5, text).sample
    assert model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.dtype == torch.float16
    torch.testing.assert_close(found, want, rtol=0.05, atol=0.05)
