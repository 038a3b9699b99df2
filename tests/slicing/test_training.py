"""Training goes on after a pruning in its middle, with whatever still holds the graph of before."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import diffprune_fast as dpf
from diffprune_fast.ops import backends

KEEP = {"0": np.arange(0, 16, 2)}


def _model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 2, 1)).to(dtype)


def _batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _loss(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return model(_batch(seed, dtype)).square().mean()


def _prune(model: nn.Module, **options: Any) -> dpf.PruneResult:
    x = (torch.empty(1, 3, 8, 8, dtype=next(model.parameters()).dtype),)
    return dpf.prune(model, dpf.trace(model, x), KEEP, example_inputs=x, **options)


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]


def _assert_like(model: nn.Module, wanted: nn.Module) -> None:
    for mine, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


SLICERS = [n for n in ("cpu", "reference") if backends()[f"slice_channels/{n}"] == "ok"]


@pytest.mark.parametrize("backend", SLICERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_loss_in_scope_holds_nothing_up(dtype: torch.dtype, backend: str) -> None:
    model = _model(dtype)
    loss = _loss(model, dtype=dtype)
    _prune(model, backend=backend)
    _loss(model, dtype=dtype).backward()
    assert [tuple(p.grad.shape) for p in model.parameters()] == [(8, 3, 3, 3), (8,), (2, 8, 1, 1), (2,)]
    assert loss.grad_fn is not None


def test_a_loop_that_prunes_goes_on_as_one_that_begins_with_the_pruned_model() -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    objects = list(model.parameters())
    for step in range(4):
        if step == 2:
            _prune(model, optimizer=optimizer)
            other = _model()
            _prune(other)
            other.load_state_dict(model.state_dict())
            others = torch.optim.AdamW(other.parameters(), lr=0.1)
            others.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        loss = _loss(model, step)  # the loss of the step before lives on until here
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 2:
            others.zero_grad()
            _loss(other, step).backward()
            others.step()
    _assert_like(model, other)
    assert all(p is q for p, q in zip(model.parameters(), objects, strict=True))
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], objects, strict=True))


def test_gradients_accumulate_across_the_pruning() -> None:
    model, before = _model(), _model()
    loss = _loss(model, 1)
    loss.backward()
    _loss(before, 1).backward()
    _prune(model)
    pruned = _model()
    _prune(pruned)
    _loss(pruned, 2).backward()
    _loss(model, 2).backward()
    first = before[0].weight.grad[KEEP["0"]]
    torch.testing.assert_close(model[0].weight.grad, first + pruned[0].weight.grad)


def test_hooks_on_parameters_see_the_new_gradients() -> None:
    model = _model()
    seen: list[tuple[int, ...]] = []
    model[0].weight.register_hook(lambda g: seen.append(tuple(g.shape)))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    loss = _loss(model)
    _prune(model)
    _loss(model).backward()
    assert seen == [(8, 3, 3, 3)] * 2
    assert loss.grad_fn is not None


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_step_is_compiled_anew(compiler: str) -> None:
    if compiler == "inductor":
        cpp = pytest.importorskip("torch._inductor.cpp_builder")
        try:
            cpp.get_cpp_compiler()
        except Exception as error:
            pytest.skip(f"no compiler: {error}")
    torch._dynamo.reset()
    model, plain = _model(), _model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = torch.compile(lambda: _loss(model), backend=compiler)
        loss = step()
        loss.backward()
        _prune(model)
        _prune(plain)
        model.zero_grad()
        step().backward()
        _loss(plain).backward()
    torch._dynamo.reset()
    for mine, wanted in zip(_gradients(model), _gradients(plain), strict=True):
        torch.testing.assert_close(mine, wanted)
    assert loss.grad_fn is not None


def _join(rank: int, ranks: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)


def _wrapped_anew(rank: int, path: str) -> None:
    _join(rank, 2, path)
    try:
        model = _model()
        former = DistributedDataParallel(model)
        loss = _loss(former, rank)
        loss.backward()
        _prune(model)
        try:
            former(_batch(rank))
            said = ""
        except RuntimeError as error:
            said = str(error)
        model.zero_grad()
        anew = DistributedDataParallel(model)
        _loss(anew, rank).backward()
        torch.save((_gradients(model), said), f"{path}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def _prepared_again(rank: int, path: str) -> None:
    from accelerate import Accelerator

    about = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "1"}
    os.environ.update({**about, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})  # asked for, but not used:
    _join(rank, 2, path)  # accelerate takes the group that is there
    try:
        accelerator = Accelerator(cpu=True)
        model = _model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        wrapped, steps = accelerator.prepare(model, optimizer)
        loss = _loss(wrapped, rank)
        accelerator.backward(loss)
        steps.step()
        _prune(accelerator.unwrap_model(wrapped), optimizer=optimizer)
        wrapped = accelerator.prepare(model)
        optimizer.zero_grad()
        accelerator.backward(_loss(wrapped, rank))
        found = _gradients(model)
        steps.step()
        torch.save((found, str(type(wrapped))), f"{path}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_reduce_their_gradients_with_a_new_wrapper_and_the_former_refuses(tmp_path: Path) -> None:
    run_ranks(_wrapped_anew, str(tmp_path / "store"))
    results = [torch.load(tmp_path / f"store-{rank}.pt") for rank in range(2)]
    model = _model()
    _prune(model)
    ((_loss(model, 0) + _loss(model, 1)) / 2).backward()
    for gradients, said in results:
        assert "pruned since DistributedDataParallel" in said
        for mine, wanted in zip(gradients, _gradients(model), strict=True):
            torch.testing.assert_close(mine, wanted)


def test_accelerate_goes_on_with_the_model_prepared_again(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    run_ranks(_prepared_again, str(tmp_path / "store"))
    (first, kind), (second, _) = (torch.load(tmp_path / f"store-{rank}.pt") for rank in range(2))
    assert "DistributedDataParallel" in kind
    assert [tuple(g.shape) for g in first] == [(8, 3, 3, 3), (8,), (2, 8, 1, 1), (2,)]
    for mine, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(mine, theirs)
