"""Set before anything imports Triton: without a GPU its kernels run in the interpreter, on CPU tensors."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Small tensors; and several test processes share the cores. `make test-matrix` asks for more.
torch.set_num_threads(int(os.environ.get("DIFFPRUNE_TEST_THREADS", "1")))
