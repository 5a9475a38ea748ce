"""From the served log and the outcomes that carry its request ids to a Panel. Here are the queries, and nothing is judged.

What a person did before the experiment comes from both logs, for the weeks before its start.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import duckdb
import numpy as np
import psycopg
import pyarrow as pa

from orchestration.compute.duck import duck
from orchestration.compute.experiments import metrics as m
from orchestration.compute.experiments.declared import Experiment
from orchestration.compute.experiments.metrics import COUNTS
from orchestration.compute.experiments.panel import Panel
from orchestration.compute.lake import Lake
from orchestration.compute.outcomes import OUTCOMES, load_outcomes, load_rows
from schemas.errors import DefinitionError
from schemas.events import LIKED_VALUE

BEFORE_DAYS = 28
"""Weeks before the start from which variance is reduced: four, so that every day of the week counts alike."""
SHARE_ROUNDING = 1e-3
"""The log keeps shares in single precision, and a file may say 0.333."""
LIGHT_EVENTS = 20
"""Events in those weeks up to which a person counts as a light user."""
SEGMENT_VALUES = 8
"""A profile's field with more values than this makes no segments."""

_SERVED = pa.schema(
    [
        ("request_id", pa.string()),
        ("user_id", pa.string()),
        ("arm", pa.string()),
        ("served_at", pa.timestamp("us", tz="UTC")),
        ("item_ids", pa.list_(pa.string())),
        ("degraded", pa.bool_()),
    ]
)


def read_panel(
    connection: psycopg.Connection[Any],
    lake: Lake,
    experiment: Experiment,
    until: datetime,
    known_until: datetime | None = None,
) -> Panel:
    """What people in `experiment` were served before `until`, and did before `known_until` (default: the same moment).

    Raises DefinitionError if nobody was served by it.
    """
    known_until = min(known_until or until, until + timedelta(days=m.ATTRIBUTED_DAYS))
    names = [arm.name for arm in experiment.arms]
    start, changed = _start(connection, experiment, until)
    before = experiment.start - timedelta(days=BEFORE_DAYS)
    with duck() as db:
        load_rows(db, "served", _SERVED, connection, _SERVED_SQL, (experiment.name, start, until, names))
        [(people,)] = db.execute("SELECT count(DISTINCT user_id) FROM served").fetchall()
        if not people:
            raise DefinitionError(
                f"experiment {experiment.name!r}: nobody was served by it between {start:%Y-%m-%d %H:%M} and "
                f"{until:%Y-%m-%d %H:%M} UTC; is its file where the function reads it, and is the served log written?"
            )
        load_rows(
            db, "earlier", _SERVED, connection, _EARLIER_SQL, (before, experiment.start, experiment.name, start, until)
        )
        load_outcomes(db, connection, lake, before, known_until)
        _survey(db, connection, before, known_until)
        db.execute(_PEOPLE)
        _habits(db, connection, lake, before, experiment.start)
        days = _days(start, known_until)
        arms = {name: place for place, name in enumerate(names)}
        rows = db.execute("SELECT arm, first_day, arms FROM people ORDER BY person").fetchall()
        counted = _counts(db, "served", "day", known_until)
        # What an arm may have moved is no covariate: of earlier lists only what was done before the start counts.
        earlier = _counts(db, "earlier", "0", experiment.start)
        events = np.zeros(people)
        for person, count in db.execute("SELECT person, events FROM habits").fetchall():
            events[person] = count
        profiles = _profiles(db, connection)
    place = counted.pop("day").astype(np.int64) - days[0].toordinal()
    total = {name: np.zeros(people) for name in COUNTS}
    for name in COUNTS:
        np.add.at(total[name], earlier["person"].astype(np.int64), earlier[name])
    # An event may come a little after the last answer, and belong to the same experiment.
    inside = place < len(days)
    person = counted.pop("person").astype(np.int64)[inside]
    return Panel(
        days=tuple(days),
        arms=tuple(names),
        arm=np.array([arms[row[0]] for row in rows], np.int64),
        first_day=np.array([row[1].toordinal() for row in rows], np.int64) - days[0].toordinal(),
        person=person,
        day=place[inside],
        counts={name: values[inside] for name, values in counted.items()},
        before=total,
        events_before=events,
        segments=_segments(events, profiles, people),
        in_two_arms=sum(row[2] > 1 for row in rows),
        shares_changed=changed.strftime("%Y-%m-%d %H:%M UTC") if changed else None,
    )


_SERVED_SQL = (
    "SELECT request_id, user_id, arm, served_at, item_ids, coalesce(cardinality(degraded), 0) > 0 FROM served_requests "
    "WHERE experiment = %s AND served_at >= %s AND served_at < %s AND arm = ANY(%s)"
)
_EARLIER_SQL = (
    "SELECT request_id, user_id, NULL, served_at, item_ids, coalesce(cardinality(degraded), 0) > 0 FROM served_requests "
    "WHERE served_at >= %s AND served_at < %s AND coalesce(arm_share, 1) > 0 AND user_id IN "
    "(SELECT user_id FROM served_requests WHERE experiment = %s AND served_at >= %s AND served_at < %s)"
)
_PEOPLE = (
    "CREATE TABLE people AS SELECT user_id, row_number() OVER (ORDER BY user_id) - 1 AS person, arg_min(arm, served_at) AS arm, "
    "CAST(min(served_at) AS DATE) AS first_day, count(DISTINCT arm) AS arms FROM served GROUP BY user_id"
)


def _start(
    connection: psycopg.Connection[Any], experiment: Experiment, until: datetime
) -> tuple[datetime, datetime | None]:
    """From when answers count: after the last one that was given under other shares than are declared now, if one was."""
    row = connection.execute(
        "SELECT max(s.served_at) FROM served_requests AS s JOIN unnest(%s::text[], %s::float8[]) AS d (arm, share) USING (arm) "
        "WHERE s.experiment = %s AND s.served_at >= %s AND s.served_at < %s AND abs(s.arm_share - d.share) > %s",
        (
            [arm.name for arm in experiment.arms],
            [arm.share for arm in experiment.arms],
            experiment.name,
            experiment.start,
            until,
            SHARE_ROUNDING,
        ),
    ).fetchone()
    changed = row[0] if row else None
    if changed is None:
        return experiment.start, None
    return changed + timedelta(microseconds=1), changed


def _survey(
    db: duckdb.DuckDBPyConnection, connection: psycopg.Connection[Any], since: datetime, until: datetime
) -> None:
    """Add the survey's answers, which are no events, by the list that was asked about."""
    rows = connection.execute(
        "SELECT request_id || ' ' || question, request_id, user_id, '', 'survey_' || question, answer::float8, answered_at "
        "FROM survey_answers WHERE answered_at >= %s AND answered_at < %s",
        (since, until),
    ).fetchall()
    if rows:
        columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), OUTCOMES.types, strict=True)]
        db.register("answers", pa.table(columns, schema=OUTCOMES))
        db.execute("INSERT INTO outcomes SELECT * FROM answers")


def _habits(
    db: duckdb.DuckDBPyConnection, connection: psycopg.Connection[Any], lake: Lake, first: datetime, end: datetime
) -> None:
    """Table `habits`: how many events each person had in those days, of whatever came to the lake."""
    db.register("lake_events", lake.events(connection, first.date(), end.date()))
    db.execute(
        "CREATE TABLE habits AS SELECT person, count(*) AS events FROM lake_events JOIN people USING (user_id) "
        "WHERE occurred_at >= ? AND occurred_at < ? GROUP BY person",
        [first, end],
    )


def _counts(
    db: duckdb.DuckDBPyConnection, served: str, day: str, known_until: datetime
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Columns `person`, `day` and every count, a row for each person and `day` (an expression) with something in it.

    Of what was done before `known_until`; a thing done to one shown item counts once, on the first day it was done.
    """
    kinds = {name: ", ".join(f"'{kind}'" for kind in group) for name, group in _GROUPS.items()}
    liked = f"kind = 'like' OR (kind = 'rating' AND value >= {LIKED_VALUE})"
    by_item = [
        (m.CLICKS, f"kind IN ({kinds['click']})"),
        (m.LIKES, liked),
        (m.HIDES, "kind = 'hide'"),
        (m.PURCHASES, "kind = 'purchase'"),
    ]
    answers = [
        (m.DWELL_SECONDS, m.DWELLS, f"kind IN ({kinds['dwell']})"),
        (m.SATISFACTION, m.SATISFACTION_ANSWERS, f"kind IN ({kinds['satisfaction']})"),
        (m.TRUST, m.TRUST_ANSWERS, f"kind IN ({kinds['trust']})"),
    ]
    served_day = "CAST(served_at AS DATE)"
    parts = [
        f"SELECT person, {served_day} AS date, count(*) AS {m.REQUESTS}, sum(len(item_ids)) AS {m.SHOWN}, "
        f"count(*) FILTER (WHERE degraded) AS {m.DEGRADED} FROM {served} JOIN people USING (user_id) GROUP BY ALL"
    ]
    parts += [
        f"SELECT person, date, count(*) AS {name} FROM (SELECT person, request_id, item_id, min(date) AS date FROM done "
        f"WHERE shown AND ({condition}) GROUP BY ALL) GROUP BY ALL"
        for name, condition in by_item
    ]
    parts.append(
        f"SELECT person, date, count(*) AS {m.CLICKED_REQUESTS} FROM (SELECT person, request_id, min(date) AS date FROM done "
        f"WHERE shown AND ({by_item[0][1]}) GROUP BY ALL) GROUP BY ALL"
    )
    parts += [
        f"SELECT person, date, sum(value) AS {total}, count(value) AS {number} FROM done WHERE {condition} GROUP BY ALL"
        for total, number, condition in answers
    ]
    db.execute(
        "CREATE OR REPLACE TEMP TABLE done AS SELECT p.person, o.request_id, o.item_id, o.kind, o.value, "
        "CAST(o.occurred_at AS DATE) AS date, list_contains(s.item_ids, o.item_id) AS shown "
        # Of the person it was served to: whoever else names the request was shown nothing by it.
        f"FROM outcomes AS o JOIN {served} AS s USING (request_id, user_id) JOIN people AS p USING (user_id) "
        # What an application reports a moment early, by a clock of its own, is still an outcome.
        f"WHERE o.occurred_at >= s.served_at - INTERVAL 1 MINUTE AND o.occurred_at < s.served_at + INTERVAL {m.ATTRIBUTED_DAYS} DAY "
        "AND o.occurred_at < ?",
        [known_until],
    )
    union = " UNION ALL BY NAME ".join(f"({part})" for part in parts)
    sums = ", ".join(f"coalesce(sum({name}), 0)::DOUBLE AS {name}" for name in COUNTS)
    when = "date_diff('day', DATE '0001-01-01', date) + 1" if day == "day" else day
    found = db.execute(f"SELECT person, {when} AS day, {sums} FROM ({union}) GROUP BY ALL ORDER BY ALL").fetchnumpy()
    return {name: np.asarray(values, np.float64) for name, values in found.items()}


_GROUPS = {
    "click": m.CLICK_KINDS,
    "dwell": m.DWELL_KINDS,
    "satisfaction": m.SATISFACTION_KINDS,
    "trust": m.TRUST_KINDS,
}


def _profiles(
    db: duckdb.DuckDBPyConnection, connection: psycopg.Connection[Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    numbers = dict(db.execute("SELECT user_id, person FROM people").fetchall())
    rows = connection.execute(
        "SELECT user_id, profile FROM people WHERE user_id = ANY(%s)", (list(numbers),)
    ).fetchall()
    return ((numbers[user_id], profile) for user_id, profile in rows)


def _segments(
    events: np.ndarray[Any, np.dtype[np.float64]], profiles: Iterator[tuple[int, dict[str, Any]]], people: int
) -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
    """By activity before the experiment, and by every field of the profile that has few values."""
    found = {
        "new people": events == 0,
        f"1–{LIGHT_EVENTS} events before": (events > 0) & (events <= LIGHT_EVENTS),
        f"more than {LIGHT_EVENTS} events before": events > LIGHT_EVENTS,
    }
    fields: dict[str, dict[str, list[int]]] = {}
    for person, profile in profiles:
        for name, value in profile.items():
            if isinstance(value, str):
                fields.setdefault(name, {}).setdefault(value, []).append(person)
    for name, values in sorted(fields.items()):
        if 2 <= len(values) <= SEGMENT_VALUES:
            for value, members in sorted(values.items()):
                found[f"{name.replace('_', ' ')}: {value}"] = np.isin(np.arange(people), members)
    return found


def _days(start: datetime, until: datetime) -> list[date]:
    """The days (UTC) that [start, until) touches."""
    last = (until.astimezone(UTC) - timedelta(microseconds=1)).date()
    first = start.astimezone(UTC).date()
    return [first + timedelta(days=n) for n in range(max(0, (last - first).days) + 1)]
