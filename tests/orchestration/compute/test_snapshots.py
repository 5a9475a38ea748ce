"""Snapshots by running totals are those of the SQL that Spark runs, whatever is built together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from orchestration.compute import snapshots as module
from orchestration.compute.duck import duck
from orchestration.compute.exact import millionths, summable
from orchestration.compute.snapshots import snapshots
from orchestration.compute.windows import snapshot_sql, tile_sql
from schemas.features import (
    ITEM,
    USER,
    USER_CATEGORY,
    FeatureView,
    active_days,
    count,
    decayed_count,
    last_seen,
    last_value,
    max_value,
    mean_value,
    min_value,
    rate,
    sum_value,
)

FIRST = date(2026, 3, 1)
VIEW = FeatureView(
    "everything",
    USER,
    "team:x",
    "",
    3,
    (
        *(count(f"events_{window}d", window) for window in (1, 2, 7, 40)),
        active_days("active_days_5d", 5),
        decayed_count("decayed_9d", 9, half_life_days=2.5),
        sum_value("value_sum_3d", 3),
        mean_value("value_mean_7d", 7),
        *(min_value(f"value_min_{window}d", window) for window in (1, 6)),
        *(max_value(f"value_max_{window}d", window) for window in (3, 8)),
        *(last_value(f"value_last_{window}d", window) for window in (2, 30)),
        rate("liked_rate_7d", 7, where="value >= 4.0", state="liked"),
        last_seen("last_seen_age_seconds", 40),
    ),
)


@pytest.fixture
def db() -> Iterator[duckdb.DuckDBPyConnection]:
    rng = np.random.default_rng(11)
    n = 3_000
    # The people of the second half come late, some of them once; there are days without anything.
    people = np.sort(rng.integers(0, 60, n))
    day = np.clip(rng.integers(0, 60, n) // 3 * 3 + people // 4, 0, 69)
    at = [
        datetime(2026, 3, 1, tzinfo=UTC) + timedelta(days=int(d), seconds=int(s))
        for d, s in zip(day, rng.integers(0, 86_400, n), strict=True)
    ]
    value = [None if rng.random() < 0.3 else round(float(x), 3) for x in rng.normal(3, 2, n)]
    with duck() as opened:
        opened.register(
            "events",
            pa.table(
                {
                    "user_id": [f"u{number}" for number in people],
                    "item_id": [f"i{number}" for number in rng.integers(0, 20, n)],
                    "kind": ["rating"] * n,
                    "value": pa.array(value, pa.float64()),
                    "occurred_at": pa.array(at, pa.timestamp("us", tz="UTC")),
                    "known_at": pa.array(at, pa.timestamp("us", tz="UTC")),
                }
            ),
        )
        opened.register("items", pa.table({"item_id": [f"i{n}" for n in range(20)], "categories": [["a", "b"]] * 20}))
        yield opened


def both(db: duckdb.DuckDBPyConnection, view: FeatureView, days: list[date]) -> tuple[pa.Table, pa.Table]:
    """The rows of the SQL, and of the running totals, in one order."""
    db.execute(f"CREATE OR REPLACE TEMP TABLE tiles AS {tile_sql(view)}")
    db.register("days", pa.table({"partition_date": pa.array(days, pa.date32())}))
    order = [("partition_date", "ascending"), *((key, "ascending") for key in view.entity.keys)]
    wanted = db.sql(snapshot_sql(view, "days")).to_arrow_table().sort_by(order)
    found = list(snapshots(db, view, days))
    return wanted, pa.concat_tables(found or [module.snapshot_schema(view).empty_table()]).sort_by(order)


@pytest.mark.parametrize("entity", [USER, ITEM, USER_CATEGORY], ids=lambda entity: entity.name)
@pytest.mark.parametrize(
    ("begin", "many", "cells"), [(0, 70, 10**6), (69, 1, 10**6), (30, 9, 500), (75, 40, 10**6), (-5, 8, 10**6)]
)
def test_they_equal_the_sql(
    db: duckdb.DuckDBPyConnection,
    monkeypatch: pytest.MonkeyPatch,
    entity: object,
    begin: int,
    many: int,
    cells: int,
) -> None:
    monkeypatch.setattr(module, "_CELLS", cells)
    days = [FIRST + timedelta(days=begin + number) for number in range(many)]
    wanted, found = both(db, replace(VIEW, entity=entity), days)
    assert found.num_rows > 0
    assert found.schema.names == wanted.schema.names
    for name in wanted.schema.names:
        if name.startswith("decayed"):
            # The SQL rounds every part to twelve places.
            np.testing.assert_allclose(found[name].to_numpy(), wanted[name].to_numpy(), rtol=1e-9, atol=1e-9)
        else:
            assert found[name].to_pylist() == wanted[name].to_pylist(), name


def test_a_partition_does_not_depend_on_what_is_built_with_it(db: duckdb.DuckDBPyConnection) -> None:
    days = [FIRST + timedelta(days=number) for number in range(50)]
    _, together = both(db, VIEW, days)
    alone = pa.concat_tables([both(db, VIEW, [day])[1] for day in days])
    assert together.equals(alone)


def test_where_nothing_happened_there_is_nothing(db: duckdb.DuckDBPyConnection) -> None:
    for day in (FIRST - timedelta(days=9), FIRST + timedelta(days=300)):
        wanted, found = both(db, VIEW, [day])
        assert (wanted.num_rows, found.num_rows) == (0, 0)


def test_decimals_of_any_size_are_whole_millionths() -> None:
    texts = ["0.000001", "-0.000001", None, "9223372036854.775807", "-9223372036854.775808"]
    small = pa.array(texts, pa.string()).cast(pa.decimal128(38, 6))
    assert millionths(small).dtype == np.int64
    assert millionths(small).tolist() == [1, -1, None, 2**63 - 1, -(2**63)]
    assert summable(millionths(small)).dtype == object
    assert summable(millionths(small.slice(0, 3))).tolist() == [1, -1, 0]
    large = pa.array([*texts, "9223372036854.775808", "-12345678901234567890.5"], pa.string()).cast(
        pa.decimal128(38, 6)
    )
    assert millionths(large.slice(1)).tolist() == [-1, None, 2**63 - 1, -(2**63), 2**63, -12345678901234567890500000]
