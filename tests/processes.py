"""Further processes of a test. They are copies of one that has imported what they need, which takes seconds of each."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch.multiprocessing as mp

_IMPORTED = (
    "diffusers.models.unets.unet_2d",
    "diffusers.schedulers.scheduling_ddpm",
    "diffusers.schedulers.scheduling_ddim",
    "diffprune_fast.method",
    "diffprune_fast.recovery.finetune",
)


def new_process(f: Callable[..., Any], *args: Any) -> BaseProcess:
    """One that is to be started; its environment is that of the first of them."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context.Process(target=f, args=args)


def run_ranks(f: Callable[..., Any], *args: Any, ranks: int = 2) -> None:
    """``f(rank, *args)`` in each of so many processes; raises where one of them does."""
    mp.get_context("forkserver").set_forkserver_preload(list(_IMPORTED))
    mp.start_processes(f, args, nprocs=ranks, start_method="forkserver")
