"""One self-contained HTML page: the table, the pictures and how they came to be."""

from __future__ import annotations

import base64
import csv
import io
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..checkpoint.manifest import versions
from .figures import HALF
from .table import Measured, lines, seeds_in_words, stages_of
from .whole import Whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Pixels of the page for an inch of a figure; its PNG has twice as many for fine screens.
PIXELS = 100


class Told(Protocol):
    """What can say how it came to be: a result of pruning."""

    def facts(self) -> dict[str, str]: ...


def write_report(
    path: str | Path,
    rows: Sequence[Measured],
    figures: Mapping[str, tuple[Figure, str]],
    *,
    title: str,
    summary: str = "",
    seeds: int = 1,
    result: Told | None = None,
    notes: Mapping[str, str] | None = None,
    code: Mapping[str, str] | None = None,
    whole: Sequence[Whole] = (),
) -> Path:
    """Write the page to ``path`` and return it. Images are inside the file, nothing is loaded from elsewhere; the
    table's raw numbers are beside it as JSON and CSV.

    Args:
        path: of the HTML file; its folder must be there.
        rows: the original's measurements, then every pruned model's.
        figures: heading to the figure and the sentence below it.
        title: of the page.
        summary: a sentence below the title.
        seeds: that the figures rest on; stands beside the table.
        result: adds what was asked and met, the scoring's trust and time per stage.
        notes: further lines of the last table, heading to text.
        code: heading to lines that are shown as they are, such as how to load the model.
        whole: what stayed whole and why (:func:`kept_whole`).

    Returns:
        ``path``.

    Raises:
        ValueError: there is no row.
        OSError: from the disk.

    Example:
        >>> import tempfile
        >>> rows = [Measured("original", 1000, 5000, 0.2, {"": {"loss": 0.031}}),
        ...         Measured("pruned", 500, 2000, 0.1, {"sliced": {"loss": 0.034}})]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     page = write_report(Path(directory) / "report.html", rows, {}, title="Half the size")
        ...     page.read_text(encoding="utf-8").count("50%")
        2
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if not rows:
        raise ValueError("there is no row to show: pass the original's measurements first")
    environment = Environment(
        loader=PackageLoader("diffprune_fast.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    path = Path(path)
    html = environment.get_template("page.html.j2").render(
        title=title,
        summary=summary,
        names=[row.name for row in rows],
        lines=[(line.heading, zip(line.cells, line.best, strict=True)) for line in lines(rows)],
        seeds=seeds_in_words(seeds),
        headline=headline(rows),
        code=code or {},
        whole=whole,
        data=", ".join(path.with_suffix(suffix).name for suffix in (".json", ".csv")),
        figures=[(heading, drawn(figure), text) for heading, (figure, text) in figures.items()],
        facts={**(result.facts() if result is not None else {}), **(notes or {}), **made_with()},
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path.write_text(html, encoding="utf-8")
    write_numbers(path, rows)
    return path


def write_numbers(path: Path, rows: Sequence[Measured]) -> None:
    """Every number of the table, unrounded: ``path`` with .json and .csv in place of its suffix."""
    path.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "stage", "metric", "value", "deviation"))
        for row in rows:
            costs: dict[str, Any] = {"params": row.params, "MACs": row.macs, "s/image": row.seconds_per_image}
            writer.writerows((row.name, "", metric, value, "") for metric, value in costs.items() if value is not None)
            for stage, figures in row.stages.items():
                for metric, value in figures.items():
                    writer.writerow((row.name, stage, metric, value, row.deviation(stage, metric) or ""))


def headline(rows: Sequence[Measured]) -> list[tuple[str, str]]:
    """The figures on top of the page: (number, what it is). Of the pruned model whose loss is lowest in the end."""
    stages = stages_of(rows)
    ends = ((row.figure(stages[-1] if stages else "", "loss"), row) for row in rows[1:])
    lost = [(loss, row) for loss, row in ends if loss is not None]
    if not lost:
        return []
    original, best = rows[0], min(lost, key=lambda pair: pair[0])[1]
    top = [
        (f"{100 * best.params / original.params:.0f}%", "of the parameters"),
        (f"{100 * best.macs / original.macs:.0f}%", "of the MACs"),
    ]
    if original.seconds_per_image and best.seconds_per_image:
        top.append((f"{original.seconds_per_image / best.seconds_per_image:.2f}×", "as fast, on this machine"))
    was = original.figure("", "loss")
    dense = "" if was is None else f" (original {was:.4f})"
    for stage in stages or [""]:
        loss = best.figure(stage, "loss")
        if loss is not None:
            what = ", ".join(filter(None, ("held-out loss", best.name, stage)))
            top.append((f"{loss:.4f}", what + dense))
    return top


@dataclass(frozen=True)
class Drawn:
    """A figure on the page. address: a ``data:`` address of its PNG. width: in pixels of the page, where there is room.
    photographic: it shows images, whose colours a dark page leaves alone. wide: it has a line for itself.
    """

    address: str
    width: int
    photographic: bool
    wide: bool


def drawn(figure: Figure) -> Drawn:
    """The figure as the page shows it: charts without ground of their own, so that they are dark on a dark page."""
    buffer, photographic = io.BytesIO(), any(axes.images for axes in figure.axes)
    figure.savefig(buffer, format="png", dpi=2 * PIXELS, transparent=not photographic)
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    width = figure.get_figwidth()
    return Drawn(address, round(width * PIXELS), photographic, wide=photographic or width > HALF[0])


def made_with() -> dict[str, str]:
    """The versions of what made the page, and the machine's kind."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return {"versions": found, "machine": f"{platform.system()} {platform.machine()}"}
