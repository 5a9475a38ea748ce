"""How a partitioned asset walks a range of days: in chunks, each settled by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from typing import Any

import dagster as dg

from inference.telemetry import inject, span
from orchestration.compute.materialise import chunks

Metadata = dict[str, Any]


@contextmanager
def asset_span(context: dg.AssetExecutionContext) -> Iterator[None]:
    """A span around an asset's body, under the trace that launched the run (tag `traceparent`), if one did."""
    carrier = {"traceparent": tag} if (tag := context.run.tags.get("traceparent")) else None
    names = ", ".join(sorted(key.to_user_string() for key in context.selected_asset_keys))
    with span(f"asset {names}", attributes={"dagster.run_id": context.run.run_id}, carrier=carrier):
        if carrier is None and (made := inject()):
            context.instance.add_run_tags(context.run.run_id, made)
        yield


def walk(
    context: dg.AssetExecutionContext,
    build: Callable[[date, date], dict[date, Metadata]],
    *,
    chunk_days: int = 30,
) -> dg.MaterializeResult[Any]:
    """Build every partition of the run's range, newest chunk first, and report each partition for itself.

    The newest partitions are those that are served: what waits there is repaired first.

    `build(first, last)` builds the days from `first` to `last` in one transaction and gives each day's metadata. If a
    chunk fails, the partitions of the chunks built before it are reported materialised, and nothing else is.
    """
    days = sorted(date.fromisoformat(key) for key in context.partition_keys)
    done: dict[date, Metadata] = {}
    try:
        for first, last in reversed(list(chunks(days[0], days[-1], chunk_days))):
            built = build(first, last)
            done |= built
            context.log.info(f"{first} to {last}: {sum(entry.get('rows', 0) for entry in built.values()):,} rows")
    except Exception as error:
        for day, metadata in done.items():
            context.log_event(dg.AssetMaterialization(context.asset_key, partition=day.isoformat(), metadata=metadata))
        failed = [day for day in days if day not in done]
        raise dg.Failure(
            f"{len(done)} of {len(days)} partitions are built; {failed[0]} to {failed[-1]} are not: {error}. "
            "Materialise the failed ones again: those that are built stay as they are."
        ) from error
    for day, metadata in done.items():
        context.add_asset_metadata(metadata, partition_key=day.isoformat())
    return dg.MaterializeResult()
