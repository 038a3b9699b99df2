"""What was measured once on a device is kept on disk: a JSON file for each device and version of PyTorch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from .clock import Clock
from .recording import Operation
from .replay import signature


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/diffprune_fast``, or ``~/.cache/diffprune_fast``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffprune_fast"


class Measured:
    """Seconds of operations, by what they are. A file that can't be read or written is as none.

    folder: None keeps nothing.
    """

    def __init__(self, clock: Clock, folder: str | os.PathLike[str] | None) -> None:
        self.clock = clock
        self.about = {"device": clock.name, "torch": torch.__version__}
        key = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else Path(folder) / f"times-{key}.json"
        self.new = 0
        self.seconds: dict[str, float] = self._read()

    def of(self, operation: Operation) -> float | None:
        """Seconds of an operation of given sizes; None where it can't be called so."""
        key = signature(operation)
        if key not in self.seconds:
            try:
                self.seconds[key] = self.clock.operation(operation)
            except (RuntimeError, ValueError, TypeError, IndexError):
                return None
            self.new += 1
        return self.seconds[key]

    def save(self) -> None:
        """Write what is new; what others wrote meanwhile stays."""
        if self.path is None or not self.new:
            return
        self.seconds = {**self._read(), **self.seconds}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            part.write_text(json.dumps({**self.about, "seconds": self.seconds}), encoding="utf-8")
            part.replace(self.path)
        except OSError:
            return
        self.new = 0

    def _read(self) -> dict[str, float]:
        if self.path is None:
            return {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(k): float(v) for k, v in found["seconds"].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return {}
