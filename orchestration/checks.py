"""Asset checks: what must hold of a partition or a model before anybody relies on it."""

import warnings
from typing import Any

import dagster as dg

from orchestration.compute.forget import EVENTS_REMOVED
from orchestration.compute.stale import staleness
from orchestration.metadata import STALE
from orchestration.resources import Larder
from schemas.features import FeatureView
from schemas.views import VIEWS


def settled_check(view: FeatureView) -> dg.AssetChecksDefinition:
    """Every partition of `view` that the ledger names holds exactly the rows it says."""

    @dg.asset_check(
        asset=view.name, name="ledger_agrees", blocking=True, description="The ledger's row counts are the table's."
    )
    def ledger_agrees(larder: Larder) -> dg.AssetCheckResult:
        with larder.connect() as connection:
            off = connection.execute(
                f"SELECT l.partition_date, l.rows, coalesce(t.rows, 0) FROM feature_ledger AS l LEFT JOIN "
                f"(SELECT partition_date, count(*) AS rows FROM features.{view.name} GROUP BY 1) AS t USING (partition_date) "
                "WHERE l.view = %s AND l.rows <> coalesce(t.rows, 0) ORDER BY 1",
                (view.name,),
            ).fetchall()
        metadata: dict[str, Any] = {"partitions_that_differ": len(off)}
        if off:
            metadata["first"] = f"{off[0][0]}: ledger {off[0][1]}, table {off[0][2]}"
        return dg.AssetCheckResult(passed=not off, metadata=metadata)

    return ledger_agrees


def stale_check(view: FeatureView) -> dg.AssetChecksDefinition:
    """No partition of `view` waits to be rebuilt because its events changed after it was built."""

    @dg.asset_check(
        asset=view.name,
        name="none_stale",
        description="No partition was built before late events came or somebody was forgotten. Stale ones are still served.",
    )
    def none_stale(larder: Larder) -> dg.AssetCheckResult:
        with larder.connect() as connection:
            found = staleness(connection, view.name)
        numbers: dict[str, Any] = {STALE: found.partitions}
        words = None
        if found.partitions:
            numbers |= {"stale_since": str(found.since), "first": str(found.first), "last": str(found.last)}
            words = (
                f"{found.partitions} partitions from {found.first} to {found.last} are stale since {found.since:%Y-%m-%d %H:%M} "
                f"UTC; `make run` rebuilds them, or `make backfill VIEW={view.name} FROM={found.first} TO={found.last} ONLY=stale`"
            )
        return dg.AssetCheckResult(
            passed=not found.partitions, severity=dg.AssetCheckSeverity.WARN, metadata=numbers, description=words
        )

    return none_stale


@dg.asset_check(asset="text_vectors", description="The HNSW index finds at least 95 % of what exact search finds.")
def index_recall_is_high(larder: Larder) -> dg.AssetCheckResult:
    from orchestration.compute.vectors import index_recall

    with larder.connect() as connection:
        recall = index_recall(connection)
    return dg.AssetCheckResult(
        passed=recall >= 0.95, metadata={"recall_at_10": recall}, severity=dg.AssetCheckSeverity.WARN
    )


@dg.asset_check(
    asset="text_vectors",
    description="Every item says something of itself. Items without any text share one vector; they are served all the same.",
)
def items_have_text(larder: Larder) -> dg.AssetCheckResult:
    with larder.connect() as connection:
        row = connection.execute(
            "SELECT count(*) FILTER (WHERE trim(title) = '' AND trim(description) = '' AND categories = '{}'), count(*), "
            "min(item_id) FILTER (WHERE trim(title) = '' AND trim(description) = '' AND categories = '{}') FROM items"
        ).fetchone()
    assert row is not None
    without, items, first = row
    return dg.AssetCheckResult(
        passed=not without,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"without_text": without, "rows": items},
        description=f"{without:,} of {items:,} items have no title, category or description; the first is {first}"
        if without
        else None,
    )


@dg.asset_check(
    asset="source_events",
    description="The lake holds at least what loads say they stored (posted events come on top), less what was erased.",
)
def counts_add_up(larder: Larder) -> dg.AssetCheckResult:
    with larder.connect() as connection:
        row = connection.execute(
            "SELECT coalesce(sum(stored_rows), 0), (SELECT coalesce(sum(rows), 0) FROM lake_files), "
            "coalesce(sum(quarantined_rows), 0), (SELECT coalesce(sum((removed ->> %s)::bigint), 0) FROM erasure_receipts) "
            "FROM ingests",
            (EVENTS_REMOVED,),
        ).fetchone()
    assert row is not None
    stored, lake, quarantined, erased = (int(value) for value in row)
    return dg.AssetCheckResult(
        passed=lake + erased >= stored,
        metadata={"stored_rows": stored, "lake_rows": lake, "quarantined_rows": quarantined, "erased_rows": erased},
    )


@dg.asset_check(asset="ranker_onnx", description="The newest version beats every floor on both splits.")
def ranker_passed_its_gate(larder: Larder) -> dg.AssetCheckResult:
    with larder.connect() as connection:
        row = connection.execute(
            "SELECT passed, record->'words' FROM gate_records ORDER BY created_at DESC LIMIT 1"
        ).fetchone()
    passed, words = row or (False, ["no gate record yet"])
    return dg.AssetCheckResult(
        passed=passed, severity=dg.AssetCheckSeverity.WARN, metadata={"verdict": "\n".join(words)}
    )


@dg.asset_check(
    asset="skew_audit",
    blocking=True,
    description="No served value differs from training without a cause. Blocks a release.",
)
def no_skew_without_a_cause(larder: Larder) -> dg.AssetCheckResult:
    from orchestration.compute.skew import newest_audit, why_not_released

    with larder.connect() as connection:
        found = newest_audit(connection)
    if found is None or not found.compared:
        return dg.AssetCheckResult(passed=True, description="nothing to audit yet")
    passed = not found.bugs
    return dg.AssetCheckResult(
        passed=passed,
        metadata={"bugs": found.bugs, "compared": found.compared},
        description=f"{found.compared:,} values compared" if passed else why_not_released(found),
    )


FRESH_BY_CRON = "0 4 * * *"
"""When yesterday's partitions must be there (UTC); the schedule starts at 01:15 and leaves time to repair."""

with warnings.catch_warnings():
    # Dagster would rather have freshness policies, but those ask when an asset was last written: backfilling an old day
    # turns them green. These ask for the newest partition.
    warnings.simplefilter("ignore", dg.SupersessionWarning)
    FRESHNESS_CHECKS = dg.build_time_partition_freshness_checks(
        assets=["events", *(view.name for view in VIEWS)],
        deadline_cron=FRESH_BY_CRON,
        severity=dg.AssetCheckSeverity.WARN,
    )
    # Off until switched on, as the schedules are. Without it a day that never came is noticed with the next one.
    FRESHNESS_SENSOR = dg.build_sensor_for_freshness_checks(
        freshness_checks=FRESHNESS_CHECKS, name="are_partitions_fresh", minimum_interval_seconds=600
    )

CHECKS = [
    *(settled_check(view) for view in VIEWS),
    *(stale_check(view) for view in VIEWS),
    *FRESHNESS_CHECKS,
    index_recall_is_high,
    items_have_text,
    counts_add_up,
    ranker_passed_its_gate,
    no_skew_without_a_cause,
]
