"""Assets of raw material: the source's catalogue and events, and how the events of each day get into the lake."""

import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import Any

import dagster as dg

from orchestration import metadata
from orchestration.compute.ingest import drain, ingest
from orchestration.compute.measures import failed, measure_events
from orchestration.compute.settle import Built
from orchestration.compute.stale import staleness
from orchestration.metadata import OWNER, column_schema
from orchestration.partitions import daily
from orchestration.progress import progress
from orchestration.ranges import Stage, asset_span
from orchestration.resources import Larder
from orchestration.sources.open import open_source
from schemas import tables
from schemas.checks import EVENT_CHECKS
from schemas.views import VIEWS

GROUP = "events"


@dg.multi_asset(
    specs=[
        dg.AssetSpec(
            "items",
            group_name=GROUP,
            owners=[OWNER],
            kinds={"postgres"},
            description="The catalogue: titles, texts, categories, when each item became available.",
            metadata=column_schema(tables.items),
            code_version="1",
        ),
        dg.AssetSpec(
            "source_events",
            group_name=GROUP,
            owners=[OWNER],
            kinds={"parquet"},
            description="Everything the source has, loaded once by event id; rows that cannot be stored are quarantined.",
            code_version="1",
        ),
    ],
    name="load_source",
)
def load_source(context: dg.AssetExecutionContext, larder: Larder) -> Iterator[dg.MaterializeResult[Any]]:
    """Load what is new in the deployment's source."""
    with asset_span(context):
        record = larder.record
        start = time.monotonic()
        source = open_source(record.data, start=record.start_date, until=datetime.now(UTC))
        with larder.connect() as connection:
            report = ingest(source, larder.lake, connection, shift_days=record.shift_days, progress=progress(context))
            (items,) = connection.execute("SELECT count(*) FROM items").fetchone() or (0,)
            sample = connection.execute(
                "SELECT item_id, title, categories FROM items ORDER BY item_id LIMIT 5"
            ).fetchall()
            quarantined = connection.execute(
                "SELECT file, line, reason FROM quarantine ORDER BY quarantine_id DESC LIMIT 10"
            ).fetchall()
    yield dg.MaterializeResult(
        "items",
        metadata={
            metadata.ROWS: items,
            "sample": metadata.markdown_table(
                ["item", "title", "categories"], [[row[0], row[1], ", ".join(row[2])] for row in sample]
            ),
        },
    )
    yield dg.MaterializeResult(
        "source_events",
        metadata={
            metadata.ROWS: report.stored,
            "read_rows": report.read,
            "duplicate_rows": report.duplicates,
            "quarantined_rows": report.quarantined,
            "people": report.people,
            "days_written": len(report.days),
            "already_loaded": report.skipped,
            "partitions_made_stale": sum(report.stale.values()),
            metadata.SECONDS: time.monotonic() - start,
            "source": source.description,
            "quarantine": metadata.markdown_table(
                ["file", "line", "reason"], [[str(cell).replace("|", "/") for cell in row] for row in quarantined]
            ),
        },
    )


EVENTS_SPEC = dg.AssetSpec(
    "events",
    group_name=GROUP,
    owners=[OWNER],
    kinds={"parquet"},
    deps=["source_events"],
    partitions_def=daily(),
    description="The events of a day in the lake, those that arrived by POST /events included.",
    code_version="2",
)


def events_stage(context: dg.AssetExecutionContext, larder: Larder) -> Stage:
    """Drain what was posted for a day, read its file once and report what it holds."""

    def build(first: date, last: date) -> dict[date, Built]:
        with larder.connect() as connection:
            # Posted for a day before the first partition: no other partition will ever take it.
            since = None if first <= larder.record.start_date else first
            drained = drain(connection, larder.lake, since, last, progress=progress(context))
            measured = measure_events(connection, larder.lake, first, last)
            stale = sum(staleness(connection, view.name).partitions for view in VIEWS)
        return {
            day: Built(
                {
                    metadata.ROWS: int(measures["rows"]),
                    "drained_in_run": drained,
                    metadata.STALE: stale,
                    metadata.LATE_RATE: measures["late_rate"],
                    **metadata.over_day_before(measures),
                },
                measures,
                failed(EVENT_CHECKS, measures),
            )
            for day, measures in measured.items()
        }

    return Stage("events", build, EVENT_CHECKS)
