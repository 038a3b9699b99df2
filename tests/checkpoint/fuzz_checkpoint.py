"""Mutated checkpoints: whatever a manifest, a config or an index says, loading ends with a model or a CheckpointError.

``python tests/checkpoint/fuzz_checkpoint.py manifest -runs=10000000`` hands the bytes to atheris (``pip install
atheris``), which finds its way by coverage; further options are libFuzzer's. ``--random 10000 --seed 0`` needs nothing
but this file. Targets: manifest, config, index.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffprune_fast import CheckpointError, from_pretrained
from diffprune_fast.checkpoint.manifest import CONFIG, MANIFEST, _sha256, read_manifest, signed
from diffprune_fast.pipelines.index import INDEX, read_index

# What is put in a value's place: each kind, and each size that something could trip over.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), "", "a", "ab", "../a", "/", "\0",
    "conv_in.weight", "conv_in", "diffusers", "UNet2DModel", "AutoModel", "__class__", "trust_remote_code",
    [], [0], [0, 1], [1, 0], [None, None], ["a", "b"], ["diffusers", "UNet2DModel"], [[]], [[["a"]]], {}, {"a": 1},
    {"a": 1, "b": 2}, {"a": {"a": {"a": {}}}},
]  # fmt: skip


class Checkpoint:
    """A small checkpoint on disk; every trial begins with it whole."""

    def __init__(self) -> None:
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

        from diffprune_fast import score_and_prune

        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=4,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
        )
        pipe = DDPMPipeline(unet, DDPMScheduler())
        settings: dict[str, Any] = {"params": 0.9, "round_to": 4}
        result = score_and_prune(pipe, None, criterion="magnitude", **settings)
        self.pipeline = Path(tempfile.mkdtemp(prefix="fuzz-"))
        result.save_pretrained(self.pipeline)
        self.folder = self.pipeline / "unet"
        self.texts = {
            "manifest": (self.folder / MANIFEST).read_text(),
            "config": (self.folder / CONFIG).read_text(),
            "index": (self.pipeline / INDEX).read_text(),
        }

    def close(self) -> None:
        shutil.rmtree(self.pipeline)

    def manifest(self, text: bytes) -> None:
        """The bytes as they are; and, where they are JSON, signed: the checksum must not be all that protects."""
        (self.folder / MANIFEST).write_bytes(text)
        try:
            known = json.loads(text)
            if isinstance(known, dict):
                (self.folder / MANIFEST).write_text(json.dumps(signed(known)))
        except (ValueError, RecursionError, CheckpointError):
            read_manifest(self.folder)
            return
        from_pretrained(self.folder)

    def config(self, text: bytes) -> None:
        (self.folder / CONFIG).write_bytes(text)
        known = json.loads(self.texts["manifest"])
        known["sha256"][CONFIG] = _sha256(self.folder / CONFIG)
        (self.folder / MANIFEST).write_text(json.dumps(signed(known)))
        from_pretrained(self.folder)

    def index(self, text: bytes) -> None:
        (self.pipeline / INDEX).write_bytes(text)
        found = read_index(self.pipeline)
        allowed = ("diffusers.", "transformers.")
        classes = [found.pipeline, *(c for c in found.components.values() if c is not None)]
        assert all(c.__module__.startswith(allowed) for c in classes), classes
        assert all("/" not in name and not name.startswith((".", "_")) for name in found.components), found

    def tried(self, target: str, text: bytes) -> str:
        """What came of it: "loaded" or "refused"; anything else is raised."""
        try:
            getattr(self, target)(text)
        except CheckpointError:
            return "refused"
        return "loaded"


def mutated(text: str, rng: random.Random) -> bytes:
    """JSON with a few places changed, or its bytes."""
    if rng.random() < 0.2:
        raw = bytearray(text.encode())
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randint(0, 3)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 3)))
        return bytes(raw)
    known = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        change(known, rng)
    return json.dumps(known).encode()


def change(value: Any, rng: random.Random) -> None:
    """One entry somewhere in a structure is replaced, renamed, moved, repeated or removed."""
    while True:
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            break
        key = rng.choice(keys)
        inner = value[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            value = inner
            continue
        how = rng.randrange(6)
        if how == 0:
            del value[key]
        elif how == 1 and isinstance(inner, (int, float)) and not isinstance(inner, bool):
            value[key] = inner + rng.choice([-1, 1, 0.5, 2**20, -inner, inner])
        elif how == 2 and len(keys) > 1:
            other = rng.choice(keys)
            value[key], value[other] = value[other], value[key]
        elif how == 3 and isinstance(value, dict):
            value[str(rng.choice(VALUES))] = value.pop(key)
        elif how == 4 and isinstance(value, list):
            value.append(rng.choice(VALUES))
        else:
            value[key] = rng.choice(VALUES)
        return
    if isinstance(value, dict):
        value["a"] = rng.choice(VALUES)
    else:
        value.append(rng.choice(VALUES))


def run_random(target: str, runs: int, seed: int = 0, say: Callable[[str], None] = print) -> dict[str, int]:
    """How many mutations were refused and loaded; raises, with the text, for what is neither."""
    checkpoint = Checkpoint()
    counts = {"refused": 0, "loaded": 0}
    try:
        for i in range(runs):
            text = mutated(checkpoint.texts[target], random.Random(f"{seed}.{target}.{i}"))
            try:
                counts[checkpoint.tried(target, text)] += 1
            except BaseException:
                say(f"{target}, seed {seed}, run {i}: {text[:4000]!r}")
                raise
    finally:
        checkpoint.close()
    return counts


def run_atheris(target: str, options: list[str]) -> None:
    import atheris

    checkpoint = Checkpoint()
    corpus = Path(tempfile.mkdtemp(prefix="corpus-"))
    (corpus / "whole").write_text(checkpoint.texts[target])
    for i in range(200):
        (corpus / str(i)).write_bytes(mutated(checkpoint.texts[target], random.Random(i)))
    for name in ("manifest", "reading", "loading", "building"):
        module = sys.modules[f"diffprune_fast.checkpoint.{name}"]
        for function in [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]:
            if callable(function) and not isinstance(function, type) and hasattr(function, "__code__"):
                function.__code__ = atheris.instrument_func(function).__code__

    def one(data: bytes) -> None:
        checkpoint.tried(target, data)

    atheris.Setup([sys.argv[0], str(corpus), "-timeout=60", *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    wanted, rest = sys.argv[1], sys.argv[2:]
    if rest and rest[0] == "--random":
        print(run_random(wanted, int(rest[1]), int(rest[3]) if len(rest) > 3 else 0))
    else:
        run_atheris(wanted, rest)
