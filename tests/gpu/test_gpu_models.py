"""A whole model, pruned on the GPU as on the CPU."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch

import diffprune_fast
from diffprune_fast.objective import make_objective
from diffprune_fast.objective.batches import Batches
from diffprune_fast.scoring.estimators import MicroScores, Work
from diffprune_fast.scoring.tables import unit_table

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture
def unet() -> torch.nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=8,
    )  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_same_keep_set_leaves_the_same_bits(
    unet: torch.nn.Module, device: torch.device, memory_format: torch.memory_format
) -> None:
    plan = diffprune_fast.trace(unet)
    there = copy.deepcopy(unet).to(device, memory_format=memory_format)
    selection = diffprune_fast.select(plan, diffprune_fast.score(unet, None, plan, criterion="magnitude"), ratio=0.3)
    diffprune_fast.prune(unet, plan, selection.keep)
    diffprune_fast.prune(there, plan, selection.keep)
    for name, weight in unet.state_dict().items():
        assert torch.equal(there.state_dict()[name].cpu(), weight), name


def test_scores_of_the_gpu_are_those_of_the_cpu(unet: torch.nn.Module, device: torch.device) -> None:
    plan = diffprune_fast.trace(unet)
    images = [torch.rand(8, 3, 16, 16) * 2 - 1 for _ in range(2)]
    options = {"estimator": "micro", "micro_batch": 8, "min_samples": 16, "max_samples": 16, "progress": False}
    here = diffprune_fast.score(unet, images, plan, **options)
    there = diffprune_fast.score(copy.deepcopy(unet).to(device), images, plan, **options)
    torch.testing.assert_close(torch.from_numpy(there.values), torch.from_numpy(here.values), rtol=0.05, atol=1e-9)


def test_score_and_prune_leaves_a_model_that_runs_and_trains(unet: torch.nn.Module, device: torch.device) -> None:
    images = [torch.rand(8, 3, 16, 16) * 2 - 1 for _ in range(2)]
    result = diffprune_fast.score_and_prune(
        unet.to(device), images, macs=0.5, micro_batch=8, min_samples=16, max_samples=16, progress=False
    )
    assert result.after.macs <= 0.55 * result.before.macs
    out = result.model(torch.randn(2, 3, 16, 16, device=device), torch.tensor([1, 500], device=device)).sample
    out.square().mean().backward()
    assert out.shape == (2, 3, 16, 16)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in result.model.parameters())


@pytest.mark.needs_cuda
def test_a_scoring_step_never_waits_and_can_be_captured(unet: torch.nn.Module, device: torch.device) -> None:
    plan = diffprune_fast.trace(unet)
    unet = unet.to(device).eval()
    objective = make_objective(unet).on(device)
    work = Work(unet, plan, objective, Batches([torch.rand(8, 3, 16, 16) * 2 - 1], lambda _: None),
                dict(unet.named_parameters()), device, 0)  # fmt: skip
    collector = MicroScores(work, unit_table(plan), "abs")
    batch, t, noise = work.draw(0, 8, np.arange(1000))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            collector.add(0, partial(work.mean_loss, batch, t, noise))
    torch.cuda.current_stream().wait_stream(stream)
    before = collector.halves()[0].clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        collector.add(0, partial(work.mean_loss, *work.draw(1, 8, np.arange(1000))))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    between = collector.halves()[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        collector.add(0, partial(work.mean_loss, batch, t, noise))
    graph.replay()
    torch.testing.assert_close(collector.halves()[0] - between, before / 3, rtol=1e-3, atol=1e-12)
