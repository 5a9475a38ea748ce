"""Dagster jobs for what people are owed besides being forgotten: exports that they asked for, and the end of retention.

Nothing that these store or log names anybody.
"""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg

from orchestration.resources import Larder
from schemas.errors import LarderError


class Export(dg.Config):
    """Which request to fulfil: the receipt's id that `POST /people/{user_id}/export` gives. Never a person's id."""

    request_id: str = ""
    """Empty: every request that waits."""


@dg.op(description="Gather all that is held of the people whose exports wait.")
def gather_exports(context: dg.OpExecutionContext, config: Export, larder: Larder) -> None:
    from orchestration.compute.person_export import fulfil, open_requests

    requests = [config.request_id] if config.request_id else open_requests(larder.url)
    failed: list[str] = []
    for request_id in requests:
        try:
            held = fulfil(request_id, url=larder.url, lake=larder.lake, artifacts_url=larder.artifacts_url)
        except LarderError as error:
            failed.append(str(error))
        except Exception as error:  # noqa: BLE001 - a driver's message may quote the row, and Dagster keeps messages
            failed.append(
                f"export request {request_id} failed with {type(error).__name__}; it waits, run the job again"
            )
        else:
            context.log.info(f"export {request_id}: {held}")
    metadata: dict[str, Any] = {"fulfilled": len(requests) - len(failed)}
    if failed:
        # Raised outside of the handlers: a cause would be kept with the failure.
        raise dg.Failure("; ".join(failed), metadata=metadata)
    context.add_output_metadata(metadata)


@dg.job(description="Make the exports that people asked for over HTTP, or by `make export REQUEST=1`.")
def export_person() -> None:
    gather_exports()


@dg.sensor(
    name="export_who_asked",
    job=export_person,
    description="Gathers what is held of people who asked for it; they fetch it by their receipt.",
    # Off until switched on, as the schedules are.
    minimum_interval_seconds=60,
)
def export_who_asked(context: dg.SensorEvaluationContext, larder: Larder) -> dg.SensorResult | dg.SkipReason:
    """One run for each request that waits; what failed is tried again the next day."""
    from orchestration.compute.person_export import open_requests

    today = datetime.now(UTC).date()
    waiting = open_requests(larder.url)
    if not waiting:
        return dg.SkipReason("nobody waits for an export")
    return dg.SensorResult(
        run_requests=[
            dg.RunRequest(
                run_key=f"export/{request_id}/{today}",
                run_config={"ops": {gather_exports.name: {"config": {"request_id": request_id}}}},
            )
            for request_id in waiting
        ]
    )


class Retention(dg.Config):
    """What to do."""

    dry_run: bool = False
    """Only count what would be deleted."""


@dg.op(description="Delete what is older than its table's retention; the last report is reports/retention/latest.json.")
def end_what_is_old(context: dg.OpExecutionContext, config: Retention, larder: Larder) -> None:
    from orchestration.compute.retention import end, expired

    now = datetime.now(UTC)
    with larder.connect() as connection:
        found = expired(connection, now) if config.dry_run else end(connection, larder.lake, now)
    for ended in found:
        context.log.info(f"{ended.table}: {ended.rows:,} rows from before {ended.before:%Y-%m-%d} ({ended.days} days)")
    if not config.dry_run:
        write_report(larder.record.folder, now, [asdict(ended) for ended in found])
    context.add_output_metadata({"rows": sum(ended.rows for ended in found), "dry_run": config.dry_run})


@dg.job(description="Delete what is older than its table's retention. docs/data-map.md says what that is.")
def retention() -> None:
    end_what_is_old()


RETENTION_SCHEDULE = dg.ScheduleDefinition(name="retention_daily", job=retention, cron_schedule="50 3 * * *")


def write_report(folder: Path, at: datetime, tables: list[dict[str, Any]]) -> None:
    """Keep the last report below a deployment's folder, for the audit; it appears whole or not at all."""
    file = folder / "reports" / "retention" / "latest.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps({"at": at.isoformat(), "tables": tables}, default=str, indent=1) + "\n")
    temporary.replace(file)
