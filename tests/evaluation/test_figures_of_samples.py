"""Precision and recall, figures of others' networks, extractors in ONNX: planted cases and clear errors."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffprune_fast.evaluation import evaluate
from diffprune_fast.evaluation.distances import Reference, find_extractor, precision_and_recall
from diffprune_fast.evaluation.pretrained import clip_score, lpips


def cloud(n: int, centre: float, spread: float = 1.0, seed: int = 0) -> np.ndarray:
    return (centre + spread * np.random.default_rng(seed).standard_normal((n, 8))).astype(np.float32)


def test_precision_falls_with_bad_samples_and_recall_with_lacking_ones():
    both = Reference(np.concatenate([cloud(100, 0), cloud(100, 50)]))
    one = Reference(np.concatenate([cloud(100, 0, seed=1), cloud(100, 0, seed=2)]))
    astray = Reference(np.concatenate([cloud(100, 0, seed=1), cloud(100, 200, seed=2)]))
    assert precision_and_recall(both, both) == (1, 1)
    precision, recall = precision_and_recall(one, both)
    assert precision > 0.75
    assert 0.35 < recall <= 0.5
    assert precision_and_recall(astray, one)[0] < 0.5


def test_the_larger_set_is_cut_to_the_smaller_ones_number():
    few, many = Reference(cloud(60, 0)), Reference(cloud(600, 0, seed=1))
    assert precision_and_recall(few, many)[0] == pytest.approx(precision_and_recall(many, few)[1], abs=0.1)
    with pytest.raises(ValueError, match="need 5 images"):
        precision_and_recall(Reference(cloud(4, 0)), many)


def test_evaluate_has_them_with_the_seconds_and_whatever_else_is_asked():
    unet = UNet2DModel(
        16, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )

    def samples(seed: int) -> Tensor:
        return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    found = evaluate(
        unet,
        samples(0),
        samples=samples,
        dense_samples=samples,
        extractor=lambda x: x.flatten(1)[:, :4],
        reference=Reference(samples(0).flatten(1)[:, :4].numpy()),
        more={"LPIPS": lpips(lambda a, b: (a - b).abs().mean((1, 2, 3))), "sizes": lambda a, b: float(len(a))},
        seeds=(0, 1, 2),
        batch_sizes=(1,),
    ).figures
    assert found["LPIPS"].mean == 0
    assert found["sizes"].mean == 6
    assert found["precision"].n == found["recall"].n == 3
    assert found["s/image"].n == 2  # the first seed warms up


def test_lpips_sees_colour_images_of_at_least_64_pixels():
    seen = []

    def distance(a: Tensor, b: Tensor) -> Tensor:
        seen.append((tuple(a.shape), tuple(b.shape)))
        return torch.zeros(len(a))

    lpips(distance)(torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 16, 16))
    assert seen == [((2, 3, 64, 64), (2, 3, 64, 64))]
    with pytest.raises(ValueError, match="there are none"):
        lpips(distance)(torch.zeros(2, 1, 16, 16), None)


def test_what_can_not_be_had_is_said_with_the_reason(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"the CLIP model .*nowhere can't be had"):
        clip_score(["a digit"], tmp_path / "nowhere")
    with pytest.raises(ValueError, match="needs prompts"):
        clip_score([], tmp_path)
    with pytest.raises(ValueError, match="choose one of 'alex'"):
        lpips("resnet")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match="torchvision"):
        lpips("alex")


def test_the_clip_score_is_the_cosine_of_picture_and_text():
    pytest.importorskip("transformers")
    directions = {"right": [1.0, 0.0], "up": [0.0, 1.0]}

    class Clip(torch.nn.Module):
        def get_image_features(self, pixels: Tensor) -> Tensor:
            return torch.tensor([[0.6, 0.8]]).expand(len(pixels), 2)

        def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
            return ids.float()

    def process(text: list[str] | None = None, images: list[Tensor] | None = None, **_: object) -> dict[str, Tensor]:
        if images is not None:
            return {"pixel_values": torch.stack([torch.as_tensor(image).float() for image in images])}
        ids = torch.tensor([directions[t] for t in text or []])
        return {"input_ids": ids, "attention_mask": torch.ones(len(ids), 2)}

    clip = Clip()
    clip.config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=77))
    score = clip_score(["right", "up"], lambda: (clip, process))
    assert score(torch.zeros(4, 1, 16, 16), None) == pytest.approx(100 * (0.6 + 0.8) / 2, rel=1e-4)


def test_an_onnx_extractor_is_run_by_onnxruntime(tmp_path, monkeypatch):
    class Session:
        def __init__(self, path: str, providers: list[str]) -> None:
            if "broken" in path:
                raise RuntimeError("not a protobuf")

        def get_inputs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(name="images", type="tensor(float)")]

        def run(self, outputs: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [given["images"].reshape(len(given["images"]), -1)]

    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    images = torch.rand(3, 1, 2, 2)
    torch.testing.assert_close(find_extractor(tmp_path / "f.onnx")(images), images.flatten(1))
    with pytest.raises(ValueError, match="is no ONNX file that can be run: not a protobuf"):
        find_extractor(tmp_path / "broken.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match="onnxruntime"):
        find_extractor(tmp_path / "f.onnx")
