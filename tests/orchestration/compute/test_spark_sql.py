"""DuckDB's SQL carried to Spark: what is mended on the way, and what is refused before a cluster is asked."""

from __future__ import annotations

import pytest

from orchestration.compute.spark_sql import compile_view, to_spark
from schemas.errors import DefinitionError
from schemas.views import VIEWS


def test_every_view_compiles() -> None:
    for view in VIEWS:
        for sql in compile_view(view):
            assert "EPOCH" not in sql
            assert "DATE_DIFF" not in sql


@pytest.mark.parametrize(
    ("duckdb", "spark"),
    [
        ("EXTRACT(EPOCH FROM occurred_at)", "UNIX_MICROS(occurred_at) / CAST(1000000 AS DOUBLE)"),
        ("DATE_DIFF('day', a, b)", "DATEDIFF(DAY, a, b)"),
        ("ARG_MAX(value, occurred_at)", "MAX_BY(value, occurred_at) FILTER(WHERE NOT value IS NULL)"),
        (
            "ARG_MAX(value, EXTRACT(EPOCH FROM at)) FILTER (WHERE a OR b)",
            "MAX_BY(value, UNIX_MICROS(at) / CAST(1000000 AS DOUBLE)) FILTER(WHERE (a OR b) AND NOT value IS NULL)",
        ),
        ("MAX(ROW(a, b))", "MAX(STRUCT(a, b))"),
        ("unnest(categories)", "EXPLODE(categories)"),
        ("CAST(a AS TIMESTAMPTZ)", "CAST(a AS TIMESTAMP)"),
    ],
)
def test_what_means_less_in_the_same_words_is_mended(duckdb: str, spark: str) -> None:
    assert to_spark(f"SELECT {duckdb} FROM t", "a state") == f"SELECT {spark} FROM t"


@pytest.mark.parametrize(
    ("duckdb", "why"),
    [
        ("quantile_of_mine(x)", "the function quantile_of_mine has no known counterpart"),
        ("list(x ORDER BY y)", "collect_list takes no order"),
        ("ARG_MAX(a, b, 3)", "'count' is not supported"),
        ("(", "Expecting"),
    ],
)
def test_what_cannot_be_carried_is_refused_with_the_way_out(duckdb: str, why: str) -> None:
    with pytest.raises(DefinitionError) as raised:
        to_spark(f"SELECT {duckdb} FROM t", "tiles of a_view")
    message = str(raised.value)
    assert message.startswith("the SQL for tiles of a_view cannot be carried to Spark: ")
    assert why in message
    assert "LARDER_ENGINE=duckdb" in message
    assert "\x1b" not in message
