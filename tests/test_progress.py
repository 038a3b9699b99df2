"""How far a loop is, where there is no terminal."""

from __future__ import annotations

import pytest

from diffprune_fast import progress


def test_without_a_terminal_progress_is_lines_and_no_carriage_returns(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0)
    with progress.bar(desc="scoring", show=True, total=96, unit="sample") as shown:
        for _ in range(3):
            shown.update(32)
            shown.set_postfix(agreement="0.9")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines][-3:] == [f"scoring: {n} of 96 samples" for n in (32, 64, 96)]
    assert lines[-1].endswith("agreement=0.9")
    assert "\r" not in "".join(lines)


@pytest.mark.parametrize("seconds", [30.0, 0.0])
def test_what_is_over_soon_or_not_to_be_shown_says_nothing(monkeypatch, capsys, seconds):
    monkeypatch.setattr(progress, "SECONDS", seconds)
    assert list(progress.bar(range(5), desc="sampling", show=seconds > 0, unit="batch")) == list(range(5))
    assert capsys.readouterr().err == ""
