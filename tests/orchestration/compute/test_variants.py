"""Events of one variant are equal in every column, events of two are not."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from orchestration.compute import variants as module
from orchestration.compute.variants import variants

KINDS = pa.array(["view", "rating", "view", None, "rating", "view"])
VALUES = pa.array([None, 4.0, None, 4.0, 4.0, float("nan")])


@pytest.mark.parametrize("most", [4096, 3])  # three: not all can be told apart, and every event is its own
def test_events_are_of_one_variant_where_all_columns_are_equal(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", most)
    variant, example = variants([KINDS, VALUES], 6)
    rows = [repr(row) for row in zip(KINDS.to_pylist(), VALUES.to_pylist(), strict=True)]
    assert [rows[example[number]] for number in variant] == rows
    assert len(example) == (4 if most == 4096 else 6)


def test_without_columns_all_events_are_of_one_variant() -> None:
    variant, example = variants([], 3)
    assert variant.tolist() == [0, 0, 0]
    assert len(example) == 1


@pytest.mark.parametrize("columns", [[], [KINDS.slice(0, 0), VALUES.slice(0, 0)]])
def test_without_events_there_are_no_variants(columns: list[pa.Array]) -> None:
    variant, example = variants(columns, 0)
    assert len(variant) == len(example) == 0


def test_as_many_variants_as_fit_a_byte_and_one_more() -> None:
    for many in (255, 256, 257):
        variant, example = variants([pa.array(np.arange(many) % many)], many)
        assert variant.tolist() == example.tolist() == list(range(many))
