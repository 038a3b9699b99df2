"""The tables that the C++ extension takes: rows of its own structs, with names on both sides, and nothing else."""

from __future__ import annotations

import importlib
import pickle
import sys

import numpy as np
import pytest

from diffprune_fast.ops import cpu

SCORE, SLICE = cpu._cpu.SCORE_ENTRY, cpu._cpu.SLICE_ENTRY


def reordered(dtype: np.dtype) -> np.dtype:
    """The same fields, of which the first two have changed places."""
    first, second, *others = dtype.names
    return np.dtype([(name, dtype[name]) for name in (second, first, *others)], align=True)


def narrower(dtype: np.dtype) -> np.dtype:
    return np.dtype([(name, dtype[name]) for name in dtype.names[:-1]], align=True)


OTHER = {"int64 columns": lambda dtype: np.int64, "another order": reordered, "a field less": narrower}


def call_scores(table: np.ndarray) -> None:
    cpu._cpu.channel_scores(0, True, table, 0, None, False, 1)


def call_slices(table: np.ndarray) -> None:
    cpu._cpu.slice_channels(table, 1)


CALLS = pytest.mark.parametrize(
    ("call", "dtype"), [(call_scores, SCORE), (call_slices, SLICE)], ids=["scores", "slices"]
)


@pytest.mark.parametrize("other", OTHER)
@CALLS
def test_rows_of_another_dtype_are_refused(call, dtype, other) -> None:
    with pytest.raises(TypeError, match=r"a table's rows must be .*'names'"):
        call(np.zeros(0, OTHER[other](dtype)))


@CALLS
def test_a_table_that_is_not_one_row_after_the_other_is_refused(call, dtype) -> None:
    for table in (np.zeros((2, 3), dtype), np.zeros(4, dtype)[::2]):
        with pytest.raises(ValueError, match=r"contiguous of shape \(n,\)"):
            call(table)


@CALLS
def test_an_equal_dtype_made_elsewhere_is_taken(call, dtype) -> None:
    call(np.zeros(0, pickle.loads(pickle.dumps(dtype))))


def test_a_row_that_lacks_a_field_is_an_error_with_its_name() -> None:
    row = dict.fromkeys(SLICE.names, 0)
    del row["mid"]
    with pytest.raises(KeyError, match="mid"):
        cpu._rows([row], SLICE)


def test_a_second_import_knows_the_rows(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "diffprune_fast._cpu")
    assert importlib.import_module("diffprune_fast._cpu").SLICE_ENTRY == SLICE
