"""Small calls of both operations, of every kind, to be run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python sanitized.py --json F

Without the caching allocator every tensor is an allocation of its own, so that reading beyond its end is seen.
"""

from __future__ import annotations

import gpu_timing
import torch

from diffprune_fast import ops

SHAPES = [(1,), (7,), (33, 129), (300, 3), (5, 9001), (12, 10, 3, 3), (40, 16, 1, 1), (16, 520, 3, 3)]
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8)


def scores(device: torch.device) -> int:
    entries = [ops.ScoreEntry((s[0], s[1] if len(s) > 1 else 1, 9 if len(s) > 2 and s[2] == 3 else 1),
                              torch.arange(s[0], dtype=torch.int32) % 50) for s in SHAPES]  # fmt: skip
    table, calls = ops.ScoreTable(entries, 50), 0
    for dtype in DTYPES[:2]:
        for steps in (None, 2):
            for last in (False, True):
                thetas = [torch.randn(s, device=device).to(dtype) for s in SHAPES]
                grads = [torch.randn(((steps,) if steps else ()) + s, device=device).to(dtype) for s in SHAPES]
                if last:
                    thetas = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in thetas]
                weights = torch.rand(steps, device=device) if steps else None
                totals = [torch.zeros(50, dtype=torch.float64, device=device) for _ in range(2)]
                ops.reference.channel_scores_(totals[0], thetas, grads, table, timestep_weights=weights)
                ops.channel_scores_(totals[1], thetas, grads, table, timestep_weights=weights, zero_grad=True)
                torch.testing.assert_close(totals[1], totals[0], rtol=1e-4, atol=1e-3)
                calls += 1
    return calls


def slices(device: torch.device) -> int:
    generator, calls = torch.Generator().manual_seed(0), 0
    for dtype in DTYPES:
        for last in (False, True):
            tensors, pieces = [], []
            for shape in SHAPES:
                tensor = (torch.rand(shape, generator=generator) * 200).to(device, dtype)
                if last and tensor.dim() == 4:
                    tensor = tensor.contiguous(memory_format=torch.channels_last)
                keep = {d: torch.arange(n)[torch.rand(n, generator=generator) < 0.7] for d, n in enumerate(shape[:2])}
                keep = {d: k if len(k) else torch.zeros(1, dtype=torch.int64) for d, k in keep.items()}
                scale = torch.rand(len(keep[0])) if dtype.is_floating_point and len(shape) == 2 else None
                tensors.append(tensor)
                pieces.append(ops.Slice(keep, scale))
            wanted = [ops.reference.slice_channels(t, p) for t, p in zip(tensors, pieces)]
            ops.slice_channels_(tensors, pieces)
            assert all(torch.equal(t, w) for t, w in zip(tensors, wanted))
            calls += 1
    return calls


def main() -> None:
    step = gpu_timing.Step("sanitized", __doc__.splitlines()[0])
    for name, calls in (("channel_scores", scores), ("slice_channels", slices)):
        if step.part in ("", name):
            step.row(operation=name, calls=calls(step.device))


if __name__ == "__main__":
    main()
