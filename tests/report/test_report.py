"""The table, the pictures and the page show what was measured, and the page needs nothing else."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from rich.console import Console

from diffprune_fast import trace
from diffprune_fast.plan import Group, Member, Plan
from diffprune_fast.report.figures import kept_channels, loss_curve, sample_grids
from diffprune_fast.report.page import headline, write_report
from diffprune_fast.report.table import DASH, Measured, lines, print_table
from diffprune_fast.scoring import LossCurve

ORIGINAL = Measured("original", 2_500_000, 80_000_000, 0.012, {"": {"loss": 0.0232, "SSIM": 1.0}})
PRUNED = Measured(
    "Diff-Pruning",
    1_250_000,
    40_000_000,
    0.008,
    {"sliced": {"loss": 0.116, "SSIM": 0.82}, "distilled": {"loss": 0.0285, "SSIM": 0.943}},
)
RANDOM = Measured(
    "random",
    1_300_000,
    40_000_000,
    None,
    {"sliced": {"loss": 0.127, "SSIM": 0.87}, "distilled": {"loss": 0.02848, "SSIM": 0.93}},
)


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


def cells(*rows: Measured) -> dict[str, tuple[str, ...]]:
    return {line.heading: line.cells for line in lines(rows)}


def best(*rows: Measured) -> dict[str, list[str]]:
    return {line.heading: [r.name for r, b in zip(rows, line.best, strict=True) if b] for line in lines(rows)}


def test_every_metric_has_a_line_for_every_stage_and_the_originals_figure_in_each():
    assert cells(ORIGINAL, PRUNED) == {
        "parameters": ("2.50M", "1.25M (50%)"),
        "MACs": ("80.00M", "40.00M (50%)"),
        "s/image": ("0.012", "0.008"),
        "loss, sliced": ("0.0232", "0.1160"),
        "loss, distilled": ("0.0232", "0.0285"),
        "SSIM, sliced": ("1.000", "0.820"),
        "SSIM, distilled": ("1.000", "0.943"),
    }


def test_what_was_not_measured_is_a_dash():
    halfway = Measured("halfway", 2, 2, None, {"sliced": {"loss": 0.5}})
    found = cells(ORIGINAL, PRUNED, halfway)
    assert found["s/image"][2] == found["loss, distilled"][2] == found["SSIM, sliced"][2] == DASH


def test_what_no_model_has_is_no_line():
    assert cells(Measured("alone", 2, 2)).keys() == {"parameters", "MACs"}


def test_a_deviation_has_the_decimals_of_its_figure_and_stands_beside_none_that_is_lacking():
    spread = {"": {"loss": 0.00162, "kernel distance": 0.0000617, "SSIM": 0.01}}
    dense = Measured("dense", 2, 2, None, {"": {"loss": 0.0313, "kernel distance": 0.00123}}, spread)
    pruned = Measured("pruned", 1, 1, None, {"": {"loss": 0.05, "SSIM": 0.9}})
    assert cells(dense, pruned)["loss"] == ("0.0313 ± 0.0016", "0.0500")
    assert cells(dense, pruned)["kernel distance"] == ("0.00123 ± 0.00006", DASH)
    assert cells(dense, pruned)["SSIM"] == (DASH, "0.900")


def test_times_of_different_moments_have_no_best_and_sizes_have_the_originals_unit():
    timed = [
        Measured(str(n), n, n, None, {"": {"ms/forward, batch 1": n / 1e5}}) for n in (2_000_000, 900_000, 800_000)
    ]
    assert not any(best(*timed).values())
    assert cells(*timed)["parameters"] == ("2.00M", "0.90M (45%)", "0.80M (40%)")


def test_where_all_pruned_models_show_the_same_none_is_the_best():
    assert not best(ORIGINAL, PRUNED, Measured("twin", 1, 1, 0.008))["s/image"]


def test_the_best_of_every_line_is_marked_whichever_row_it_is():
    worse = Measured("worse", 1, 1, 0.01, {"sliced": {"loss": 0.3, "SSIM": 0.1}, "distilled": {"loss": 0.3}})
    assert best(ORIGINAL, worse, PRUNED, RANDOM) == {
        "parameters": [],
        "MACs": [],
        "s/image": ["Diff-Pruning"],
        "loss, sliced": ["Diff-Pruning"],
        "loss, distilled": ["Diff-Pruning", "random"],  # they show the same figure
        "SSIM, sliced": ["random"],  # more is better
        "SSIM, distilled": ["Diff-Pruning"],
    }


def test_one_pruned_model_alone_is_not_the_best_of_any():
    assert not any(best(ORIGINAL, PRUNED).values())


def test_the_terminals_table_has_every_heading_and_figure_and_the_number_of_seeds():
    out = io.StringIO()
    print_table([ORIGINAL, PRUNED], title="Digits", console=Console(file=out, width=120))
    text = out.getvalue()
    shown = {"original", "Diff-Pruning", *cells(ORIGINAL, PRUNED), *cells(ORIGINAL, PRUNED)["loss, sliced"]}
    assert all(word in text for word in ("Digits", "one seed", *shown))
    with pytest.raises(ValueError, match="no row"):
        print_table([])


def test_the_terminals_best_figure_has_a_star():
    out = io.StringIO()
    print_table([ORIGINAL, PRUNED, RANDOM], console=Console(file=out, width=120))
    assert "*0.1160" in out.getvalue()
    assert "*0.1270" not in out.getvalue()
    assert "*0.0232" not in out.getvalue()


def test_headline_compares_the_model_with_the_lowest_loss_in_the_end_with_the_original():
    assert [number for number, _ in headline([ORIGINAL, PRUNED])] == ["50%", "50%", "1.50×", "0.1160", "0.0285"]
    assert [number for number, _ in headline([ORIGINAL, PRUNED, RANDOM])] == ["52%", "50%", "0.1270", "0.0285"]
    assert headline([ORIGINAL]) == headline([ORIGINAL, Measured("unmeasured", 1, 1)]) == []


def test_the_page_marks_the_best_and_says_how_many_seeds(tmp_path):
    path = write_report(tmp_path / "r.html", [ORIGINAL, PRUNED, RANDOM], {}, title="Digits", seeds=3)
    text = path.read_text(encoding="utf-8")
    assert '<td class="best">0.1160</td><td>0.1270</td>' in text
    assert "3 seeds" in text


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
    shown = {cell for line in lines([ORIGINAL, PRUNED]) for cell in (line.heading, *line.cells)}
    assert {"Digits at half the MACs", "The curve.", "The bars.", *shown} <= set(page.text)


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


def test_sample_grids_have_a_row_for_every_list_and_blanks_where_it_is_shorter():
    images = torch.zeros(2, 1, 2, 2)
    axes = sample_grids([{"original": images, "a, sliced": images}, {"b, sliced": images}], columns=2).axes
    assert [a.get_title() for a in axes] == ["original", "a, sliced", "b, sliced", ""]
    assert [len(a.images) for a in axes] == [1, 1, 1, 0]
    assert axes[0].get_subplotspec().rowspan.start == 0 < axes[2].get_subplotspec().rowspan.start


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


def test_kept_channels_come_in_the_order_of_the_forward():
    class Backwards(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = (torch.nn.Linear(*n) for n in ((8, 2), (4, 8), (3, 4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.middle(self.first(x)))

    axes = kept_channels(trace(Backwards(), (torch.zeros(1, 3),)), {}).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "middle"]


def test_a_page_inverts_its_charts_in_the_dark_and_never_its_samples(tmp_path):
    samples = sample_grids({"dense": torch.zeros(2, 1, 8, 8)})
    figures = {"Samples": (samples, ""), "Timesteps": (loss_curve(curve()), "")}
    text = write_report(tmp_path / "r.html", [ORIGINAL], figures, title="Digits").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark) { figure.chart img { filter: invert(1)" in text
    assert text.count('<figure class="chart">') == text.count('<figure class="pictures">') == 1
