"""Triton kernels.

Their modules lie in ``kernels/triton`` of the source tree and beside this file once installed. ``kernels`` itself is
no package: the ecosystem has one of that name, and running from the repository root must not shadow it.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent
_SOURCE = _HERE.parents[1] / "kernels" / "triton"

if (_HERE.parents[1] / "csrc").is_dir() and _SOURCE.is_dir():
    __path__.append(str(_SOURCE))
