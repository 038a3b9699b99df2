"""The table, the pictures and the page show what was measured, and the page needs nothing else."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from rich.console import Console

from diffprune_fast.plan import Group, Member, Plan
from diffprune_fast.report.figures import kept_channels, loss_curve, sample_grids
from diffprune_fast.report.page import headline, write_report
from diffprune_fast.report.table import DASH, HEADINGS, Measured, cells, print_table
from diffprune_fast.scoring import LossCurve

ORIGINAL = Measured("original", 2_500_000, 80_000_000, 0.012, 0.0232)
PRUNED = Measured("Diff-Pruning", 1_250_000, 40_000_000, 0.008, 0.116, 0.0285, 0.82, 0.943)


def plan() -> Plan:
    groups = tuple(
        Group(name, n, (Member("conv.weight", 0, np.arange(n)[:, None]),)) for name, n in (("a", 8), ("b", 16))
    )
    return Plan("Toy", groups, (), {}, {"conv.weight": (24, 3, 3, 3)})


def curve(threshold: float = 0.05) -> LossCurve:
    return LossCurve(np.array([0, 100, 500, 999]), np.array([0.5, 0.1, 0.02, 0.001]), threshold)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.images, self.addresses, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes["src"])
        self.addresses += [v for k, v in attributes.items() if k in ("src", "href") and not v.startswith("data:")]

    def handle_data(self, data):
        self.text.append(data.strip())


def test_cells_show_sizes_with_their_share_and_a_dash_for_what_was_not_measured():
    assert cells(PRUNED, ORIGINAL) == (
        "Diff-Pruning", "1.25M (50%)", "40.00M (50%)", "0.008", "0.1160", "0.0285", "0.820", "0.943",
    )  # fmt: skip
    assert cells(ORIGINAL, ORIGINAL)[1:3] == ("2.50M", "80.00M")
    assert cells(ORIGINAL)[5:] == (DASH, DASH, DASH)


def test_the_terminals_table_has_every_heading_and_figure():
    out = io.StringIO()
    print_table([ORIGINAL, PRUNED], title="Digits", console=Console(file=out, width=120))
    text = out.getvalue()
    assert all(word in text for word in ("Digits", *HEADINGS, *cells(PRUNED), "0.0232"))
    with pytest.raises(ValueError, match="no row"):
        print_table([])


def test_headline_compares_the_pruned_model_with_the_original():
    assert [number for number, _ in headline(ORIGINAL, PRUNED)] == ["50%", "50%", "1.50×", "0.0285"]


def test_the_page_holds_all_images_and_asks_for_nothing_else(tmp_path):
    figures = {"Timesteps": (loss_curve(curve()), "The curve."), "Layers": (kept_channels(plan(), {}), "The bars.")}
    path = write_report(tmp_path / "report.html", [ORIGINAL, PRUNED], figures, title="Digits at half the MACs")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.addresses == []
    assert len(page.images) == 2
    for image in page.images:
        kind, data = image.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert {"Digits at half the MACs", "The curve.", "The bars.", *cells(PRUNED, ORIGINAL)} <= set(page.text)


def test_the_pages_words_cannot_become_markup(tmp_path):
    evil = "<script>alert(1)</script>"
    path = write_report(tmp_path / "r.html", [ORIGINAL], {}, title=evil, notes={evil: evil})
    assert evil not in path.read_text()
    assert evil in Page(path.read_text()).text


def test_a_page_without_measurements_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no row"):
        write_report(tmp_path / "r.html", [], {}, title="nothing")
    assert not (tmp_path / "r.html").exists()


def test_sample_grids_place_image_i_in_row_i_div_columns():
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 2, 3).contiguous()
    axes = sample_grids({"one": images, "two": -images}, columns=2).axes
    assert [a.get_title() for a in axes] == ["one", "two"]
    shown = axes[0].images[0].get_array()
    expected = np.zeros((9, 8))  # a pixel between the images, and blank where there is none
    for i in range(5):
        row, column = divmod(i, 2)
        expected[3 * row : 3 * row + 2, 4 * column : 4 * column + 3] = i / 4
    np.testing.assert_allclose(shown, expected, atol=1e-6)


def test_sample_grids_refuse_what_cannot_be_compared_or_shown():
    with pytest.raises(ValueError, match="same noise"):
        sample_grids({"a": torch.zeros(4, 1, 8, 8), "b": torch.zeros(5, 1, 8, 8)})
    with pytest.raises(ValueError, match="4 channels: decode latents"):
        sample_grids({"latents": torch.zeros(4, 4, 8, 8)})
    with pytest.raises(ValueError, match="at least one grid"):
        sample_grids({})


def test_loss_curve_draws_the_relative_loss_and_the_threshold():
    lines = loss_curve(curve(0.05)).axes[0].lines
    np.testing.assert_allclose(lines[0].get_xydata(), [[0, 1], [100, 0.2], [500, 0.04], [999, 0.002]])
    assert set(lines[1].get_ydata()) == {0.05}
    assert len(loss_curve(curve(0.0)).axes[0].lines) == 1


def test_kept_channels_draws_each_groups_share_and_counts():
    axes = kept_channels(plan(), {"a": np.arange(2)}).axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [1.0, 1.0, 0.25, 1.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.texts] == ["2 of 8", "16 of 16"]
