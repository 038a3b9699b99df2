"""How far a loop is: a bar in a terminal or notebook, a line now and then where there is neither."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

# Seconds between two lines.
SECONDS = 30.0


def bar(
    of: Iterable[Any] | None = None,
    *,
    desc: str,
    show: bool,
    total: int | None = None,
    initial: int = 0,
    unit: str = "step",
) -> Any:
    """tqdm's bar, to iterate or as a context manager with ``update``; lines on stderr where nobody watches it move.

    initial: so much was done before.
    """
    from tqdm import auto

    options: dict[str, Any] = {"desc": desc, "total": total, "initial": initial, "unit": unit, "disable": not show}
    watched = sys.stderr.isatty() or auto.notebook_tqdm is not auto.std_tqdm
    return auto.tqdm(of, **options) if watched else _lines()(of, **options)


def _lines() -> type:
    from tqdm.std import tqdm

    class Lines(tqdm):
        """``scoring: 256 of 512 samples, 00:41, 00:40 left``; nothing of a loop that is over before the first."""

        disable: bool

        def __init__(self, *args: Any, unit: str, **options: Any) -> None:
            units = unit + ("es" if unit.endswith("ch") else "s")
            format = "{desc}: {n_fmt} of {total_fmt} " + units + ", {elapsed}, {remaining} left{postfix}"
            times = {"mininterval": SECONDS, "miniters": 1, "delay": SECONDS}
            super().__init__(*args, unit=unit, bar_format=format, ascii=True, leave=False, **times, **options)

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            """A line of its own; none in place of one that is to vanish."""
            if msg is None:
                print(self, file=sys.stderr, flush=True)
            return True

        def set_postfix(self, *args: Any, **options: Any) -> None:
            super().set_postfix(*args, **{**options, "refresh": False})

        def close(self) -> None:
            if not getattr(self, "disable", True):
                self.disable = True
                self._decr_instances(self)

    return Lines
