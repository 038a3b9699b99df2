"""Every backend of the table: its module has the operation, and the operation's numbers are the reference's."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from diffprune_fast import ops
from diffprune_fast.ops import dispatch

BACKENDS = [(op, name) for op, table in dispatch.BACKENDS.items() for name in table]


def device_of(op: str, name: str) -> torch.device:
    """One that the backend serves. Skips where this machine has none."""
    devices = dispatch.BACKENDS[op][name].devices or ("cpu",)
    for kind in devices:
        if kind == "cpu" or getattr(torch, kind).is_available():
            return torch.device(kind)
    pytest.skip(f"no {' or '.join(devices)} on this machine")


def channel_scores(backend: str, device: torch.device) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    theta, grad = (torch.randn(6, 5, 3, 3, generator=rng, dtype=torch.float64).to(device) for _ in range(2))
    units = (torch.tensor([2, 0, 1, -1, 2, 3]), torch.tensor([4, 4, 5, -1, 0]))
    entry = ops.ScoreEntry((6, 5, 9), *(u.int().to(device) for u in units), weight=0.5)
    scores = torch.ones(6, dtype=torch.float64, device=device)
    return ops.channel_scores_(scores, [theta], [grad], ops.ScoreTable([entry], 6), backend=backend).cpu()


def slice_channels(backend: str, device: torch.device) -> torch.Tensor:
    tensor = torch.arange(6.0 * 5 * 9, device=device).view(6, 5, 3, 3)
    keep = {0: torch.tensor([0, 3, 5], device=device), 1: torch.tensor([1, 4], device=device)}
    ops.slice_channels_([tensor], [ops.Slice(keep)], backend=backend)
    return tensor.cpu()


@pytest.mark.parametrize(("op", "name"), BACKENDS)
def test_a_backends_module_has_the_operation_and_says_where_it_serves(op: str, name: str) -> None:
    module = f"diffprune_fast.{dispatch.BACKENDS[op][name].module}"
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module} is not there"
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    assert re.search(rf"^def {op}_\(", source, re.MULTILINE)
    assert name == "reference" or re.search(r"^def availability\(", source, re.MULTILINE)


@pytest.mark.parametrize(("op", "name"), BACKENDS)
def test_a_backend_agrees_with_the_reference(op: str, name: str) -> None:
    device = device_of(op, name)
    reason = ops.backends()[f"{op}/{name}"]
    if reason != "ok":
        pytest.skip(reason)
    found, expected = (globals()[op](backend, device) for backend in (name, "reference"))
    torch.testing.assert_close(found, expected)
