"""`make backfill`: materialise a range of days again through the running Dagster instance, and watch it.

It talks to the instance that `make ui` started and starts none itself: the run must go on after Ctrl-C, and it must be
seen, searched and stopped in the same UI as every other run. A server of this command's own would die with it.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import psycopg

from infra import deployment as deployments
from infra import postgres
from infra.arguments import MakeParser
from infra.ui import running_at
from orchestration.compute.settle import shown, stretches
from orchestration.compute.stale import DAILY, rebuild_parts, to_rebuild
from orchestration.instance_api import BACKFILL_TAG, FINISHED, PART_TAG, DailyAsset, InstanceApi, Run
from schemas.errors import InstanceError, LarderError, SettingsError

USAGE = "make backfill VIEW=a,b FROM=2026-01-01 TO=2026-01-31"
ONLY = ("missing", "failed", "stale")
POLL_SECONDS = 1.0
STOP_SECONDS = 120.0
"""How long `cancel` waits: a run that is starting cannot be told to stop before it runs, and then finishes its query."""
STOPPED = frozenset({"CANCELING", "CANCELED"})
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Part:
    """One run to launch: these assets over this stretch of days."""

    assets: tuple[str, ...]
    first: date
    last: date

    @property
    def days(self) -> int:
        return (self.last - self.first).days + 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return _main(options)
    except LarderError as error:
        print(f"error ({error.type}): {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = MakeParser(
        f"{USAGE} [ONLY={'|'.join(ONLY)}] [DRY_RUN=1], or RESUME=1, CANCEL=1",
        prog="python -m orchestration.backfill",
        description="Materialise a range of daily partitions through the running Dagster instance (`make ui`) and watch "
        "it. The status is 0 only if every partition was materialised. Ctrl-C stops the watching, not the run.",
    )
    parser.add_argument("--view", help=f"what to build, comma separated: {', '.join(DAILY)}")
    parser.add_argument("--from", dest="first", help="first day, YYYY-MM-DD (UTC)")
    parser.add_argument("--to", dest="last", help="last day, included")
    parser.add_argument(
        "--only",
        help=f"{', '.join(ONLY)} of these: missing or failed by the state that Dagster shows; stale by the ledger: built before late events "
        "came or somebody was forgotten. Name events too, so that what was posted late is drained first",
    )
    parser.add_argument("--dry-run", action="store_true", help="print which partitions would run, and launch nothing")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="ID", help="watch a backfill again (default: the last)"
    )
    parser.add_argument("--cancel", nargs="?", const="", metavar="ID", help="stop a backfill (default: the last)")
    parser.add_argument("--url", help="the instance (default: what `make ui` of this deployment recorded)")
    return parser


def _main(options: argparse.Namespace) -> int:
    again = options.resume is not None or options.cancel is not None
    if not again:
        views, first, last = read_views(options.view), read_day("FROM", options.first), read_day("TO", options.last)
        if options.only is not None:
            options.only = read_only(options.only)
        if last < first:
            raise SettingsError(f"the range ends before it starts: FROM={first} TO={last}; turn them round")
    api = InstanceApi(options.url or _recorded_url())
    if again:
        wanted = (options.resume if options.resume is not None else options.cancel).strip()
        runs = api.runs(None if wanted in ("", "1") else wanted)
        if not runs:
            raise SettingsError(f"there is no backfill {wanted}" if wanted not in ("", "1") else "there is no backfill")
        return cancel(api, runs) if options.cancel is not None else watch(api, runs)
    assets = api.daily_assets(views)
    if unknown := [name for name in views if name not in assets]:
        raise InstanceError(f"the instance at {api.url} has no asset {unknown[0]!r}; reload its definitions")
    stale = _stale(first, last) if options.only == "stale" else {}
    parts = plan([assets[name] for name in views], first, last, options.only, stale)
    _print_plan(parts, options.only)
    if options.dry_run or not parts:
        return 0
    api.wait_for_daemon()
    backfill = uuid.uuid4().hex[:8]
    location = next(iter(assets.values())).location
    # Said before the first launch, so that whatever happens here can be watched or stopped from elsewhere.
    print(f"backfill {backfill} · Ctrl-C stops watching, not the backfill", flush=True)
    for number, part in enumerate(parts, 1):
        if any(run.status in STOPPED for run in api.runs(backfill)):
            print(f"stopped from elsewhere: runs {number} to {len(parts)} are not launched", flush=True)
            break
        tags = {BACKFILL_TAG: backfill, PART_TAG: str(number)}
        api.launch(part.assets, part.first, part.last, location, tags)
    return watch(api, api.runs(backfill))


def _stale(first: date, last: date) -> dict[str, set[date]]:
    """The daily partitions to build again, by asset, as the ledger of the current deployment knows them."""
    record = deployments.current()
    with psycopg.connect(postgres.prepare(record), options="-c TimeZone=UTC") as connection:
        return to_rebuild(connection, max(first, record.start_date), last)


def _recorded_url() -> str:
    record = deployments.current()
    url = running_at(record)
    if url is None:
        raise InstanceError(
            f"no Dagster instance runs for deployment {record.name!r}; start it with `make ui` in another terminal"
        )
    return url


def read_views(text: str | None) -> list[str]:
    """The named daily assets, each once, in the order of their making. SettingsError names near matches."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    if not names:
        raise SettingsError(f"VIEW names nothing to build; it is one or more of: {', '.join(DAILY)}; such as {USAGE}")
    for name in names:
        if name not in DAILY:
            near = difflib.get_close_matches(name, DAILY, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(DAILY)}"
            raise SettingsError(f"there is no view {name!r}; {hint}")
    return [name for name in DAILY if name in names]


def read_only(text: str) -> str:
    """One of ONLY. SettingsError names near matches."""
    if text not in ONLY:
        near = difflib.get_close_matches(text, ONLY, 1)
        hint = f"did you mean {near[0]}?" if near else f"it is one of: {', '.join(ONLY)}"
        raise SettingsError(f"there is no ONLY={text}; {hint}")
    return text


def read_day(name: str, text: str | None) -> date:
    """A day given as YYYY-MM-DD. Raises SettingsError."""
    if not text:
        raise SettingsError(f"{name}= is missing; give the first and the last day, such as {USAGE}")
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise SettingsError(f"{name}={text} is not a day; write it as YYYY-MM-DD, e.g. 2026-01-31") from None


def plan(
    assets: Sequence[DailyAsset],
    first: date,
    last: date,
    only: str | None,
    stale: Mapping[str, Collection[date]] | None = None,
) -> list[Part]:
    """The runs to launch: one for the whole range, or with `only` one for every stretch of days that needs the same assets.

    Dagster gives a run one range without gaps; a run over the gaps as well would build what nobody asked for. Days that
    are `stale`, by asset, go as `rebuild_parts` says. Raises SettingsError for days outside the partitions.
    """
    for asset in assets:
        if first < asset.first or last > asset.last:
            bad = f"FROM={first}" if first < asset.first else f"TO={last}"
            raise SettingsError(
                f"{bad} is outside the partitions of {asset.name!r}: {asset.first} to {asset.last} (today is not a partition)"
            )
    if only == "stale":
        chosen = {asset.name: (stale or {}).get(asset.name, ()) for asset in assets}
        return [Part(*part) for part in rebuild_parts(chosen)]
    days = [first + timedelta(days=offset) for offset in range((last - first).days + 1)]
    wanted: dict[tuple[str, ...], list[date]] = {}
    for day in days:
        names = tuple(asset.name for asset in assets if _needed(asset.state.get(day), only))
        if names:
            wanted.setdefault(names, []).append(day)
    parts = [Part(names, *stretch) for names, group in wanted.items() for stretch in stretches(group)]
    return sorted(parts, key=lambda part: part.first)


def _needed(state: str | None, only: str | None) -> bool:
    if only == "failed":
        return state == "FAILED"
    return state is None if only == "missing" else True


def _print_plan(parts: Sequence[Part], only: str | None) -> None:
    if not parts:
        print(f"nothing to do: no partition is {only}")
    for number, part in enumerate(parts, 1):
        span = f"{part.first}" if part.days == 1 else f"{part.first} to {part.last}"
        count = part.days * len(part.assets)
        print(f"run {number} of {len(parts)}: {', '.join(part.assets)}: {span} ({_partitions(count)})", flush=True)


def _partitions(count: int) -> str:
    return f"{count:,} partition{'' if count == 1 else 's'}"


def watch(api: InstanceApi, runs: Sequence[Run]) -> int:
    """Follow the runs until all have ended, print what became of each partition; the command's exit status."""
    backfill = runs[0].backfill
    try:
        built = {run.run_id: _follow(api, run, len(runs)) for run in runs}
        return _summary(api.runs(backfill), built)
    except KeyboardInterrupt:
        print(
            f"\nno longer watching; backfill {backfill} goes on\n"
            f"  make backfill RESUME={backfill}    watches it again\n"
            f"  make backfill CANCEL={backfill}    stops it; what is finished stays"
        )
        return INTERRUPTED


def _follow(api: InstanceApi, run: Run, total: int) -> set[tuple[str, date]]:
    """Print one run's progress until it has ended; the partitions that it reported materialised."""
    built: set[tuple[str, date]] = set()
    cursor, shown_status = None, ""
    while True:
        (status,) = (now.status for now in api.runs(run.backfill) if now.run_id == run.run_id)
        if status != shown_status and status not in FINISHED:
            print(f"run {run.part} of {total} · {api.url}/runs/{run.run_id} · {status.lower()}", flush=True)
            shown_status = status
        # The status is read before the events: what a finished run logged is all there.
        while True:
            events, cursor = api.events(run.run_id, cursor)
            for event in events:
                if (partition := _materialised(event)) is not None:
                    built.add(partition)
                match event["__typename"]:
                    case "LogMessageEvent" if event["level"] == "INFO" and event["stepKey"]:
                        print(f"  {event['message']}", flush=True)
                    case "ExecutionStepFailureEvent" if event["error"]:
                        print("\n".join(f"  {line}" for line in _reason(event["error"])), flush=True)
            if not events:
                break
        if status in FINISHED:
            print(f"run {run.part} of {total} · {status.lower()}", flush=True)
            return built
        time.sleep(POLL_SECONDS)


def _reason(error: dict[str, object]) -> list[str]:
    """The lines of an error that a person can use, without the class that Dagster puts in front."""
    message = str(error["message"]).strip()
    head, _, rest = message.partition(": ")
    return (rest if " " not in head and rest else message).splitlines()


def _summary(runs: Sequence[Run], built: dict[str, set[tuple[str, date]]]) -> int:
    done: dict[str, set[date]] = {}
    failed: dict[str, set[date]] = {}
    idle: dict[str, set[date]] = {}
    for run in runs:
        for name in run.assets:
            for offset in range((run.last - run.first).days + 1):
                day = run.first + timedelta(days=offset)
                to = idle if run.status == "CANCELED" else failed
                to = done if (name, day) in built[run.run_id] else to
                to.setdefault(name, set()).add(day)
    names = [name for name in DAILY if any(name in run.assets for run in runs)]
    width = max(map(len, names))
    for name in names:
        counts = f"{len(done.get(name, ())):6,} materialised  {len(failed.get(name, ())):6,} failed"
        counts += f"  {len(idle[name]):6,} not run" if name in idle else ""
        print(f"{name:<{width}}  {counts}")
    for words, found in (("failed", failed), ("not run", idle)):
        for name in names:
            if name in found:
                print(f"{words}: {name}: {shown(found[name])}")
    if failed:
        print("mend the cause, then run the same command with ONLY=failed")
    if checks := [run for run in runs if run.status == "FAILURE"]:
        blocked = [run for run in checks if not any(name in failed for name in run.assets)]
        if blocked:
            print(f"every partition was built, but a blocking check failed: see run {blocked[0].run_id[:8]}")
    return 0 if all(run.status == "SUCCESS" for run in runs) and not failed and not idle else 1


def cancel(api: InstanceApi, runs: Sequence[Run], seconds: float = STOP_SECONDS) -> int:
    """Stop every run that has not ended, and wait until it has; the status is 0 only if nothing of it goes on.

    Dagster refuses to stop a run while it starts, so that is asked again until it can be. What a run has finished stays.
    """
    backfill = runs[0].backfill
    asked = {run.run_id for run in runs if run.status not in FINISHED}
    if not asked:
        print(f"backfill {backfill} has ended already")
        return 0
    told: set[str] = set()
    refused: dict[str, str] = {}
    end = time.monotonic() + seconds
    while True:
        # Every round asks anew which there are: whoever launches the parts may have been at it.
        runs = api.runs(backfill)
        open_runs = [run for run in runs if run.status not in FINISHED]
        asked |= {run.run_id for run in open_runs}
        # The later ones first: otherwise the queue starts the next as soon as one ends.
        for run in reversed(open_runs):
            if run.run_id in told or run.status in STOPPED:
                continue
            reason = api.terminate(run.run_id)
            if reason is None:
                told.add(run.run_id)
                refused.pop(run.run_id, None)
                print(f"run {run.part} · told to stop", flush=True)
            else:
                if run.run_id not in refused:
                    print(f"run {run.part} · {run.status.lower()}, is told to stop as soon as it can be", flush=True)
                refused[run.run_id] = reason
        if not open_runs or time.monotonic() > end:
            break
        time.sleep(POLL_SECONDS)
    for run in runs:
        if run.run_id not in asked:
            continue
        if run.status not in FINISHED:
            why = refused.get(run.run_id, f"it was told to and is {run.status.lower()}")
            print(f"run {run.part} · could not be stopped within {seconds:.0f} s: {why}")
        else:
            late = "" if run.status == "CANCELED" or run.run_id in told else ", before it could be stopped"
            print(f"run {run.part} · {run.status.lower()}{late}")
    if open_runs:
        print(f"backfill {backfill} goes on\n  make backfill CANCEL={backfill}    tries again to stop it")
        return 1
    _summary(runs, {run.run_id: _built(api, run) for run in runs})
    print(f"backfill {backfill} has ended; what is materialised stays, ONLY=missing builds what was never built")
    return 1 if all(run.status == "SUCCESS" for run in runs if run.run_id in asked) else 0


def _built(api: InstanceApi, run: Run) -> set[tuple[str, date]]:
    """The partitions that the run reported materialised so far."""
    built: set[tuple[str, date]] = set()
    cursor = None
    while True:
        events, cursor = api.events(run.run_id, cursor)
        if not events:
            return built
        built |= {partition for event in events if (partition := _materialised(event)) is not None}


def _materialised(event: Mapping[str, Any]) -> tuple[str, date] | None:
    """The partition that this event of a run's log says was materialised."""
    if event["__typename"] != "MaterializationEvent" or not event["partition"]:
        return None
    return event["assetKey"]["path"][0], date.fromisoformat(event["partition"])


if __name__ == "__main__":
    sys.exit(main())
