"""`make explain`: which rows made the features of one entity at one instant, as a table."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infra import deployment as deployments
from infra import postgres
from infra.arguments import MakeParser
from infra.feature_tables import ensure_view_tables
from orchestration.compute.explain import EventRow, Explanation, explain
from orchestration.compute.lake import Lake
from schemas.errors import DefinitionError, LarderError, RequestError, SettingsError
from schemas.features import FeatureView
from schemas.views import VIEWS

# Whoever pipes it on has no width: there an id stands in one line, and can be searched for.
console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = MakeParser(
        "make explain VIEW=… KEY=… [AT=instant]",
        prog="python -m orchestration.explain",
        description="Show each feature of one entity at one instant, and the rows that made it: the snapshot's partition "
        "and its states, the events since, and those that were learned of late.",
    )
    parser.add_argument("--view", required=True, help=f"a feature view: {', '.join(view.name for view in VIEWS)}")
    parser.add_argument(
        "--key", required=True, help='the entity; of several columns "a,b" or, where an id holds a comma, ["a","b"]'
    )
    parser.add_argument("--at", help="the instant of the read, such as 2030-01-31T12:00:00Z (default: now)")
    parser.add_argument("--events", type=int, default=20, metavar="N", help="show at most N events a list (default 20)")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    try:
        view = view_named(options.view)
        key, at = key_of(view, options.key), instant_of(options.at)
        record = deployments.current()
        if deployments.load(record.name) is None:
            raise SettingsError(f"there is nothing to explain in {deployments.home()}: run `make run` first")
        url = postgres.prepare(record)
        ensure_view_tables(url)
        _show(explain(view, key, at, url=url, lake=Lake(record.lake_url), limit=options.events), options.events)
    except LarderError as error:
        console.print(f"[red]error[/red] ({error.type}): {escape(str(error))}", soft_wrap=True)
        return 1
    return 0


def view_named(name: str) -> FeatureView:
    """The view of that name. Raises DefinitionError that says which one may have been meant."""
    known = {view.name: view for view in VIEWS}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DefinitionError(f"there is no view {name!r}{hint}; known: {', '.join(known)}")
    return known[name]


def key_of(view: FeatureView, text: str) -> tuple[str, ...]:
    """The key's parts as `text` names them. Raises RequestError if they are not as many as the view's key columns."""
    columns = view.entity.keys
    if len(columns) == 1:
        return (text,)
    parts: object = text.split(",")
    if text.startswith("["):
        with contextlib.suppress(ValueError):  # an id may begin with a bracket
            parts = json.loads(text)
    if not isinstance(parts, list) or len(parts) != len(columns) or not all(isinstance(part, str) for part in parts):
        raise RequestError(
            f"KEY= (--key) {text!r} does not name one {' and one '.join(columns)}; give {','.join(columns)}, or a JSON list"
        )
    return tuple(parts)


def instant_of(text: str | None) -> datetime:
    """The instant that `text` names, now without one; of a day with its zone, such as 2030-01-31Z, midnight. Raises RequestError for anything else."""
    if text is None:
        return datetime.now(UTC)
    # A plain day with a zone is what the advice below leads to; Python reads it without one only.
    text = re.sub(r"^(\d{4}-\d{2}-\d{2})(Z|[+-]\d{2}:?\d{2})$", r"\1T00:00:00\2", text)
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise RequestError(f"AT= (--at) {text!r} is no instant; write for example 2030-01-31T12:00:00Z") from error
    if at.tzinfo is None:
        raise RequestError(f"AT= (--at) {text!r} has no time zone; write {text}Z for UTC")
    return at.astimezone(UTC)


def _show(found: Explanation, limit: int) -> None:
    console.print(
        f"[bold]{found.view.name}[/bold] of {escape(', '.join(found.key))} at {_time(found.at)}", soft_wrap=True
    )
    partition = found.partition
    if partition is None:
        console.print(
            f"no snapshot is fit to be read (its ttl is {found.view.ttl_days} days), so there is no value; "
            f"materialise {found.view.name} to yesterday: `make run` does"
        )
    else:
        words = f"snapshot of {partition.partition_date}, built {_time(partition.built_at)} from {found.snapshot_events:,} events"
        if partition.stale:
            words += ", stale: materialise it again"
        console.print(words, soft_wrap=True)
    table = Table()
    for name in ("feature", "status", "value", "window since", "states: snapshot → with head", "head events"):
        table.add_column(name, justify="right" if name in ("value", "head events") else "left", overflow="fold")
    for feature in found.features:
        states = "\n".join(
            f"{name}: {_state(name, before)} → {_state(name, after)}"
            for name, (before, after) in feature.states.items()
        )
        table.add_row(
            feature.name,
            feature.status,
            _number(feature.value),
            f"{feature.since:%Y-%m-%d}",
            states,
            str(feature.head_events),
        )
    console.print(table)
    if not found.head and not found.snapshot_events:
        console.print("nothing is held of this entity: check the key, or the instant")
        return
    _events("head: events since the snapshot", found.head[:limit], len(found.head))
    _events("snapshot: events of the lake behind it", found.snapshot, found.snapshot_events)
    if found.late:
        _events("late: learned of after their day had ended", found.late, len(found.late))
        console.print("a late event is in the snapshots built after it was known, and in no training row before")
    if found.unread:
        console.print(f"{found.unread:,} events since the snapshot are no longer kept online: this read misses them")


def _events(title: str, events: Sequence[EventRow], count: int) -> None:
    more = f", the newest {len(events)} of {count:,}" if count > len(events) else ""
    if not count:
        console.print(f"{title}: none")
        return
    console.print(f"{title}{more}", soft_wrap=True)
    table = Table()
    for name in ("event", "occurred at", "person", "item", "kind", "value", "known at"):
        table.add_column(name, justify="right" if name == "value" else "left", overflow="fold")
    for event in events:
        table.add_row(
            escape(event.event_id),
            _time(event.occurred_at),
            escape(event.user_id),
            escape(event.item_id),
            event.kind,
            _number(event.value),
            f"{_time(event.known_at)} late" if event.late else "on time",
        )
    console.print(table)


def _time(instant: datetime) -> str:
    return f"{instant.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _state(name: str, value: float | None) -> str:
    """A state of the column `name`; instants are kept in seconds since 1970."""
    if value is not None and name.rsplit("_", 1)[0].endswith("_at"):
        return _time(datetime.fromtimestamp(float(value), UTC))
    return _number(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{float(value):,.6g}"


if __name__ == "__main__":
    sys.exit(main())
