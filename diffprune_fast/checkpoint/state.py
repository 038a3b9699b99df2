"""The state of work that takes long, on disk: one file, replaced as a whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (plain values and tensors) so that ``path`` is the former file or the new one, whenever the
    process or the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    with beside.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_state(path: Path, settings: Mapping[str, Any], work: str = "training") -> dict[str, Any] | None:
    """The state in ``path``, None where there is no file; loading it runs no code of it.

    work: what it has to be the state of, in a word. Raises ValueError for a file that is no such state, or one of other
    ``settings``.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:
        raise ValueError(f"{path} can't be read as a {work}'s state ({error}): remove it to begin anew") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("work", "training") != work:
        raise ValueError(f"{path} is no {work}'s state of this version: remove it to begin anew")
    other = sorted(k for k in settings if state["settings"].get(k) != settings[k])
    if other:
        was = ", ".join(f"{k}={state['settings'].get(k)!r}" for k in other)
        now = ", ".join(f"{k}={settings[k]!r}" for k in other)
        raise ValueError(f"{path} is of a {work} with {was}, not {now}: remove it to begin anew")
    return state
