"""How the daily assets walk a range of days: in chunks, each day settled and reported for itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

import dagster as dg

from inference.telemetry import inject, span
from orchestration import metadata
from orchestration.compute.settle import Build, Built, GoOn, Settled, chunks, kept_from, settle, shown, stretches
from orchestration.compute.telling import Say
from orchestration.progress import progress
from schemas.checks import Check

_QUERY_CANCELLED = "57014"
_FAILING_DAYS = "failing_days"
_SHOWN_DAYS = 50

Results = Iterator[dg.MaterializeResult[Any] | dg.AssetMaterialization | dg.AssetCheckResult]


@dataclass(frozen=True, slots=True)
class Stage:
    """One daily asset of a walk: how its days are built, and which days of which earlier stage they read.

    A day reads the `window_days` days of `reads` that end with it; `reads` is None where nothing daily is read.
    """

    name: str
    build: Build
    checks: tuple[Check, ...] = ()
    reads: str | None = None
    window_days: int = 1


@contextmanager
def asset_span(context: dg.AssetExecutionContext) -> Iterator[None]:
    """A span around an asset's body, under the trace that launched the run (tag `traceparent`), if one did.

    The first asset of a run that nothing traced begins a trace, and the others of that run join it.
    """
    recorded = context.instance.get_run_by_id(context.run.run_id) or context.run
    carrier = {"traceparent": tag} if (tag := recorded.tags.get("traceparent")) else None
    names = ", ".join(sorted(key.to_user_string() for key in context.selected_asset_keys))
    with span(f"asset {names}", attributes={"dagster.run_id": context.run.run_id}, carrier=carrier):
        if carrier is None and (made := inject()):
            context.instance.add_run_tags(context.run.run_id, made)
        yield


def walk(context: dg.AssetExecutionContext, stages: Sequence[Stage]) -> Results:
    """Build the partitions of the run's range for every stage, chunk by chunk, and report each for itself.

    A day that a stage cannot build, or whose blocking check fails, stops only the days of later stages that read it.
    What was written is reported written even when the run fails or is told to stop; nothing else is.
    """
    days = sorted(date.fromisoformat(key) for key in context.partition_keys)
    settled = {stage.name: Settled() for stage in stages}
    say = progress(context)
    try:
        for first, last in stretches(days):
            for chunk in chunks(first, last):
                for stage in stages:
                    _chunk(stage, *chunk, settled, say, partial(_go_on, context))
    except GeneratorExit:
        raise
    except BaseException:
        yield from _reported(settled)
        raise
    if any(one.failed for one in settled.values()):
        yield from _reported(settled)
        yield from _judged(context, stages, settled)
        raise dg.Failure(_story(settled), metadata={name: len(one.failed) for name, one in settled.items()})
    for stage in stages:
        for day, built in settled[stage.name].built.items():
            context.add_asset_metadata(_page(built), asset_key=stage.name, partition_key=day.isoformat())
        yield dg.MaterializeResult(stage.name)
    yield from _judged(context, stages, settled)


def _go_on(context: dg.AssetExecutionContext, error: Exception | None) -> None:
    """Stop here if somebody cancelled the run.

    The signal alone does not tell: the database driver takes it while it waits, and all that is left is a failed query.
    """
    run = context.instance.get_run_by_id(context.run.run_id)
    cancelled = run is not None and run.status == dg.DagsterRunStatus.CANCELING
    if cancelled or getattr(error, "sqlstate", None) == _QUERY_CANCELLED:
        raise dg.DagsterExecutionInterruptedError("told to stop; what is finished stays") from error


def _chunk(stage: Stage, first: date, last: date, settled: dict[str, Settled], say: Say, go_on: GoOn) -> None:
    into = settled[stage.name]
    unfit = settled[stage.reads].unfit if stage.reads in settled else set()
    days = [date.fromordinal(number) for number in range(first.toordinal(), last.toordinal() + 1)]
    fit = []
    for day in days:
        if missing := kept_from(day, stage.window_days, unfit):
            into.failed[day] = f"not built, because it reads {stage.reads} of {shown(missing)}, which failed"
        else:
            fit.append(day)
    settle(fit, stage.build, into, go_on)
    built = [day for day in days if day in into.built]
    rows = sum(into.built[day].metadata.get(metadata.ROWS, 0) for day in built)
    say(f"{stage.name}, {first} to {last}: {len(built)} of {len(days)} days, {rows:,} rows")
    if failed := [day for day in days if day in into.failed]:
        say(f"{stage.name}: failed {shown(failed)}")


def _page(built: Built) -> dict[str, Any]:
    names = [check.name for check in built.failed_checks]
    # Always there, so that it becomes a chart: zero is an answer.
    return {**built.metadata, metadata.FAILED_CHECKS: len(names), **({"failing": ", ".join(names)} if names else {})}


def _reported(settled: dict[str, Settled]) -> Iterator[dg.AssetMaterialization]:
    for name, one in settled.items():
        for day, built in sorted(one.built.items()):
            yield dg.AssetMaterialization(name, partition=day.isoformat(), metadata=_page(built))


def _judged(
    context: dg.AssetExecutionContext, stages: Iterable[Stage], settled: dict[str, Settled]
) -> Iterator[dg.AssetCheckResult]:
    """One result per check over the days of this run; the numbers of every day stand in its own metadata.

    Days that failed in earlier runs and were not built since keep the check from passing, as a warning: otherwise
    repairing one day would hide another, and blocking for their sake would stop good days.
    """
    selected = set(context.selected_asset_check_keys)
    for stage in stages:
        built = settled[stage.name].built
        for check in stage.checks:
            key = dg.AssetCheckKey(dg.AssetKey(stage.name), check.name)
            if not built or key not in selected:
                continue
            bad = sorted(day for day, one in built.items() if check in one.failed_checks)
            still = sorted(_failing_before(context, key) - set(built))
            values = [one.measures[check.measure] for one in built.values() if check.measure in one.measures]
            numbers: dict[str, Any] = {
                "days": len(built),
                "days_that_fail": len(bad),
                _FAILING_DAYS: dg.MetadataValue.json([day.isoformat() for day in (*bad, *still)]),
            }
            if values:
                numbers |= {f"{check.measure}_min": min(values), f"{check.measure}_max": max(values)}
            if bad:
                rows = [[str(day), f"{built[day].measures[check.measure]:g}"] for day in bad[:_SHOWN_DAYS]]
                numbers[check.measure] = metadata.markdown_table(["day", check.measure], rows)
            severity = dg.AssetCheckSeverity.ERROR if check.blocking and bad else dg.AssetCheckSeverity.WARN
            words = [f"fails on {shown(bad)}"] if bad else []
            words += [f"failed earlier, not built since: {shown(still)}"] if still else []
            yield dg.AssetCheckResult(
                asset_key=stage.name,
                check_name=check.name,
                passed=not bad and not still,
                severity=severity,
                metadata=numbers,
                description="; ".join(words) or None,
            )


def _failing_before(context: dg.AssetExecutionContext, key: dg.AssetCheckKey) -> set[date]:
    """The days that the check's newest result before this run's names as failing."""
    # The newest record is this run's own plan to evaluate the check; plans of runs that died have no result either.
    for record in context.instance.event_log_storage.get_asset_check_execution_history(key, limit=10):
        event = record.event.dagster_event if record.event else None
        if event is None or event.event_type != dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            continue
        found = event.asset_check_evaluation_data.metadata.get(_FAILING_DAYS)
        return (
            {date.fromisoformat(day) for day in found.value or ()} if isinstance(found, dg.JsonMetadataValue) else set()
        )
    return set()


def _story(settled: dict[str, Settled]) -> str:
    """What was built and what was not, one line per asset and reason."""
    lines = []
    for name, one in settled.items():
        total = len(one.built) + len(one.failed)
        lines.append(f"{name}: {len(one.built)} of {total} partitions are built")
        by_reason: dict[str, list[date]] = {}
        for day, reason in sorted(one.failed.items()):
            by_reason.setdefault(reason, []).append(day)
        lines += [f"{name}: {shown(days)} failed: {reason}" for reason, days in by_reason.items()]
    lines.append("Mend the cause and materialise the failed ones again: those that are built stay as they are.")
    return "\n".join(lines)
