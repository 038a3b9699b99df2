"""The table that compares models: measured once, shown in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Measured:
    """What one model costs and what it is worth.

    seconds_per_image: wall clock. loss: diffusion loss on held-out images, straight after pruning for a pruned model;
    loss_finetuned: the same after finetuning. ssim, ssim_finetuned: likeness of its samples to the original's, from
    the same noise. None: not measured, shown as a dash.
    """

    name: str
    params: int
    macs: int
    seconds_per_image: float | None
    loss: float
    loss_finetuned: float | None = None
    ssim: float | None = None
    ssim_finetuned: float | None = None


HEADINGS = (
    "model",
    "params",
    "MACs",
    "s/image",
    "loss",
    "loss, finetuned",
    "SSIM",
    "SSIM, finetuned",
)


DASH = "–"


WIDTH = 110


def cells(row: Measured, original: Measured | None = None) -> tuple[str, ...]:
    """The row as text, one cell per heading; sizes beside their share of ``original``'s, where one is given."""
    return (
        row.name,
        f"{_short(row.params)}{_share(row.params, (original or row).params)}",
        f"{_short(row.macs)}{_share(row.macs, (original or row).macs)}",
        DASH if row.seconds_per_image is None else f"{row.seconds_per_image:.3g}",
        f"{row.loss:.4f}",
        DASH if row.loss_finetuned is None else f"{row.loss_finetuned:.4f}",
        DASH if row.ssim is None else f"{row.ssim:.3f}",
        DASH if row.ssim_finetuned is None else f"{row.ssim_finetuned:.3f}",
    )


def _short(n: int) -> str:
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= factor:
            return f"{n / factor:.2f}{unit}"
    return str(n)


def _share(n: int, of: int) -> str:
    return "" if n == of else f" ({100 * n / of:.0f}%)"


def print_table(rows: Sequence[Measured], *, title: str = "", console: Console | None = None) -> None:
    """Print ``rows`` in the terminal. Raises ValueError when there is no row."""
    from rich.console import Console
    from rich.table import Table

    if not rows:
        raise ValueError("there is no row to print: pass the models' measurements")
    table = Table(title=title or None, title_justify="left")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*cells(row))
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)  # a log has no width of its own; the default would break the headings
    console.print(table)
