"""One self-contained HTML page: the table, the pictures and how they came to be."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.manifest import versions
from .table import Measured, lines, seeds_in_words, stages_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..result import PruneResult


def write_report(
    path: str | Path,
    rows: Sequence[Measured],
    figures: Mapping[str, tuple[Figure, str]],
    *,
    title: str,
    summary: str = "",
    seeds: int = 1,
    result: PruneResult | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write the page to ``path`` and return it. Images are inside the file, nothing is loaded from elsewhere.

    Args:
        path: of the HTML file; its folder must be there.
        rows: the original's measurements, then every pruned model's.
        figures: heading to the figure and the sentence below it.
        title: of the page.
        summary: a sentence below the title.
        seeds: that the figures rest on; stands beside the table.
        result: adds what was asked and met, the scoring's trust and time per stage.
        notes: further lines of the last table, heading to text.

    Returns:
        ``path``.

    Raises:
        ValueError: there is no row. OSError: from the disk.

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
    html = environment.get_template("page.html.j2").render(
        title=title,
        summary=summary,
        names=[row.name for row in rows],
        lines=[(line.heading, zip(line.cells, line.best, strict=True)) for line in lines(rows)],
        seeds=seeds_in_words(seeds),
        headline=headline(rows),
        figures=[(heading, embedded(figure), text) for heading, (figure, text) in figures.items()],
        facts={**_facts_of(result), **(notes or {}), **made_with()},
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path = Path(path)
    path.write_text(html, encoding="utf-8")
    return path


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


def embedded(figure: Figure) -> str:
    """The figure as a ``data:`` address of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _facts_of(result: PruneResult | None) -> dict[str, str]:
    if result is None:
        return {}
    facts = {}
    if result.selection is not None:
        facts["asked for"] = result.selection.asked
        facts["met"] = result.selection.met
        for i, note in enumerate(result.selection.notes):
            facts["note" if i == 0 else f"note {i + 1}"] = note
        facts["ranking"] = result.selection.ranking
        facts["allocation"] = result.selection.allocation
    facts["norm groups"] = result.norm_groups
    if result.compensation is not None:
        facts["compensation"] = str(result.compensation).splitlines()[0]
    if result.scores is not None:
        scores = result.scores
        facts["scores"] = f"{scores.criterion}, estimator {scores.estimator}, {scores.samples} samples"
        if scores.agreement is not None:
            facts["split-half agreement"] = f"{scores.agreement:.3f} (two halves of the samples, same kept units)"
    if result.seconds:
        facts["time"] = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    if result.seed is not None:
        facts["seed"] = str(result.seed)
    return facts


def made_with() -> dict[str, str]:
    """The versions of what made the page, and the machine's kind."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return {"versions": found, "machine": f"{platform.system()} {platform.machine()}"}
