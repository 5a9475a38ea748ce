"""A range walked in chunks: the newest first, and each day reported for itself."""

from datetime import date, timedelta
from typing import Any

import dagster as dg

from orchestration.ranges import walk

DAYS = dg.DailyPartitionsDefinition(start_date="2024-01-01", end_date="2024-03-11")


def launch(instance: dg.DagsterInstance, broken_before: date | None = None) -> tuple[list[date], set[str]]:
    """Which chunk began when, and the partitions that are reported materialised."""
    began: list[date] = []

    def build(first: date, last: date) -> dict[date, dict[str, Any]]:
        began.append(first)
        if broken_before is not None and first < broken_before:
            raise ValueError("poisoned")
        return {first + timedelta(days=n): {"rows": 1} for n in range((last - first).days + 1)}

    def walked(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
        return walk(context, build)

    asset = dg.asset(name="walked", partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run())(walked)
    tags = {
        "dagster/asset_partition_range_start": "2024-01-01",
        "dagster/asset_partition_range_end": "2024-03-10",
    }
    dg.materialize([asset], instance=instance, tags=tags, raise_on_error=False)
    return began, instance.get_materialized_partitions(dg.AssetKey("walked"))


def test_what_is_served_is_repaired_first() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        began, reported = launch(instance)
    assert began == [date(2024, 3, 1), date(2024, 1, 31), date(2024, 1, 1)]
    assert len(reported) == 70


def test_what_was_built_before_a_failure_is_reported_and_nothing_else() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        began, reported = launch(instance, broken_before=date(2024, 2, 1))
    assert began == [date(2024, 3, 1), date(2024, 1, 31)]
    assert (min(reported), max(reported), len(reported)) == ("2024-03-01", "2024-03-10", 10)
