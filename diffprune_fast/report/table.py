"""The table that compares models: measured once, shown in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Measured:
    """What one model costs and what it is worth.

    seconds_per_image: wall clock; None: not measured, shown as a dash. stages: what was done to the model so far
    ("sliced", "compensated", …) to what was measured of it then ("loss", "SSIM", …), in the order of the table. A model
    that has no stages, such as the original, has one without a name: its figures stand beside those of every stage.
    deviations: of figures that are means over seeds, in the same form.
    """

    name: str
    params: int
    macs: int
    seconds_per_image: float | None = None
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    deviations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def figure(self, stage: str, metric: str) -> float | None:
        """What was measured at that stage, if it was."""
        return self.stages.get(stage, self.stages.get("", {})).get(metric)

    def deviation(self, stage: str, metric: str) -> float | None:
        """That figure's standard deviation over the seeds, if there are several."""
        return self.deviations.get(stage, self.deviations.get("", {})).get(metric)


@dataclass(frozen=True)
class Line:
    """One line of the table: a cell for every model, and whether it is the best of the pruned ones."""

    heading: str
    cells: tuple[str, ...]
    best: tuple[bool, ...]


DASH = "–"


# Decimals of the figures whose size is known; others get three digits.
DECIMALS = {"loss": 4, "SSIM": 3, "Fréchet distance": 1, "precision": 3, "recall": 3, "LPIPS": 3, "CLIP score": 1}
HIGHER_IS_BETTER = frozenset({"SSIM", "precision", "recall", "CLIP score"})


WIDTH = 110


def stages_of(rows: Sequence[Measured]) -> list[str]:
    """The names of all stages, in order."""
    return list(dict.fromkeys(stage for row in rows for stage in row.stages if stage))


def lines(rows: Sequence[Measured]) -> list[Line]:
    """The table of ``rows``, a column for each: what they cost, then every metric at every stage.

    Sizes stand beside their share of the first row's. The best of a line is sought among the models after the first,
    which is the original; where two show the same, both are, and where all do, none. What no model has, has no line.
    """
    names = stages_of(rows) or [""]
    most = sorted(rows, key=lambda row: -max(map(len, row.stages.values()), default=0))  # what all lack has their order
    metrics = list(dict.fromkeys(m for row in most for figures in row.stages.values() for m in figures))
    plain = tuple(False for _ in rows)
    found = [
        Line("parameters", tuple(_size(row.params, rows[0].params) for row in rows), plain),
        Line("MACs", tuple(_size(row.macs, rows[0].macs) for row in rows), plain),
        _line("s/image", [row.seconds_per_image for row in rows], None, higher=False),
    ]
    for metric in metrics:
        for stage in names:
            figures = [row.figure(stage, metric) for row in rows]
            heading = f"{metric}, {stage}" if stage else metric
            line = _line(heading, figures, DECIMALS.get(metric), higher=metric in HIGHER_IS_BETTER)
            spread = [row.deviation(stage, metric) for row in rows]
            found.append(replace(line, cells=tuple(map(_with_spread, line.cells, spread))))
    return [line for line in found if set(line.cells) != {DASH}]


def _with_spread(cell: str, deviation: float | None) -> str:
    """``0.0313 ± 0.0016``: the deviation has the decimals of the figure, where it shows at all in so many."""
    if deviation is None or cell == DASH:
        return cell
    decimals = 0 if "e" in cell else len(cell.partition(".")[2])
    text = f"{deviation:.{decimals}f}"
    return f"{cell} ± {text if float(text) or not deviation else format(deviation, '.1g')}"


def _line(heading: str, figures: Sequence[float | None], decimals: int | None, *, higher: bool) -> Line:
    cells = tuple(DASH if x is None else f"{x:.3g}" if decimals is None else f"{x:.{decimals}f}" for x in figures)
    pruned = [x for x in figures[1:] if x is not None]
    if len(pruned) < 2:
        return Line(heading, cells, tuple(False for _ in figures))
    top = cells[1:][figures[1:].index((max if higher else min)(pruned))]
    if all(cell in (top, DASH) for cell in cells[1:]):
        top = ""
    return Line(heading, cells, (False, *(cell == top for cell in cells[1:])))


def _size(n: int, of: int) -> str:
    return _short(n) if n == of else f"{_short(n)} ({100 * n / of:.0f}%)"


def _short(n: int) -> str:
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= factor:
            return f"{n / factor:.2f}{unit}"
    return str(n)


def seeds_in_words(seeds: int) -> str:
    """What stands beside a table: how many seeds it rests on."""
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def print_table(rows: Sequence[Measured], *, title: str = "", seeds: int = 1, console: Console | None = None) -> None:
    """Print ``rows`` in the terminal, a column for each; the best of every line, of the pruned models, has a star.

    Args:
        rows: the original's measurements, then every pruned model's.
        title: a line above the table.
        seeds: that the figures rest on; stands below the table.
        console: where to print; None is the terminal, or plain text of fixed width where there is none.

    Returns:
        None.

    Raises:
        ValueError: there is no row.

    Example:
        >>> import io
        >>> from rich.console import Console
        >>> rows = [Measured("original", 1000, 5000, stages={"": {"loss": 0.03}}),
        ...         Measured("pruned", 500, 2000, stages={"sliced": {"loss": 0.08}, "compensated": {"loss": 0.04}})]
        >>> console = Console(file=io.StringIO(), width=110)
        >>> print_table(rows, console=console)
        >>> [words in console.file.getvalue() for words in ("loss, compensated", "0.0400", "one seed")]
        [True, True, True]
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        raise ValueError("there is no row to print: pass the models' measurements")
    caption = f"{seeds_in_words(seeds)}; *: the best of the pruned models"
    table = Table(title=title or None, title_justify="left", caption=caption, caption_justify="left")
    for i, heading in enumerate(("", *(row.name for row in rows))):
        table.add_column(heading, justify="left" if i == 0 else "right")
    for line in lines(rows):
        marked = zip(line.cells, line.best, strict=True)
        cells = [Text(f"*{cell}", "bold") if best else Text(cell) for cell, best in marked]
        table.add_row(line.heading, *cells)
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)  # a log has no width of its own; the default would break the headings
    console.print(table)
