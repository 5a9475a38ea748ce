"""The drift report of a day: what was served against the windows before it and against the champion's time."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import psycopg
import pyarrow.parquet as pq

from inference import artifacts
from orchestration.compute.drift import plots, sketches
from orchestration.compute.drift.judge import (
    ALARM,
    WAITING,
    Comparison,
    Finding,
    comparison,
    days_of_training,
    judge,
    level,
    since_training,
    tests_of,
)
from orchestration.compute.drift.outcomes import (
    Calibrated,
    calibrated,
    label_means,
    outcomes_known,
    read_outcomes,
)
from orchestration.compute.drift.served import (
    Window,
    feature_sketches,
    load_categories,
    read_requests,
    request_sketches,
)
from orchestration.compute.drift.sketches import (
    CALIBRATION,
    CATEGORIES,
    DAY,
    FEATURES,
    LABELS,
    SCORES,
    WEEK,
    Kept,
    Mean,
    Name,
    days_before,
    sketch,
)
from orchestration.compute.drift.statistics import psi
from orchestration.compute.drift.vectors import VECTORS, compare_vectors, person_vectors, shown, taken
from orchestration.compute.lake import Lake
from orchestration.compute.report_files import Draw
from orchestration.compute.telling import Say, silent
from orchestration.compute.training_set import PATH as TRAINING_SET
from schemas.errors import ArtifactError
from schemas.views import CONTEXT_VIEWS, VIEWS, context_features, fingerprint

KINDS = (FEATURES, SCORES, CATEGORIES, VECTORS, LABELS, CALIBRATION)
CURED_BY_TRAINING = (FEATURES, SCORES, VECTORS, LABELS, CALIBRATION)
"""Kinds of which a severe finding asks for a new model. Sources and degraded answers are for an operator to look at."""
SHOWN_DAYS = 28


@dataclass(frozen=True, slots=True)
class Champion:
    """The model that serves: when the last event that it learned from happened, and its calibration (scale, offset)."""

    version: str
    trained_until: datetime | None
    calibration: tuple[float, float] | None


@dataclass(slots=True)
class DriftReport:
    """What was found for the day that ended; `trained` is PSI from the training set's labels, by feature."""

    day: date
    champion: Champion | None
    requests: int
    findings: list[Finding]
    curve: Calibrated | None
    freshness: dict[str, int | None]
    """Days that each view's newest partition, and the newest day of events, lies behind the report's; None: there is none."""
    trained: dict[str, float]
    history: dict[str, list[Mean | None]] = field(default_factory=dict)
    days: list[date] = field(default_factory=list)

    @property
    def alarms(self) -> list[Finding]:
        return [one for one in self.findings if one.state == ALARM]

    @property
    def severe(self) -> list[Finding]:
        """Alarms that a new model may cure, at twice the distance that is needed for one."""
        return [one for one in self.alarms if one.severe and one.kind in CURED_BY_TRAINING]

    def of(self, kind: str) -> list[Finding]:
        return [one for one in self.findings if one.kind == kind]

    def waits(self, kind: str) -> str | None:
        """Why nothing of this kind was compared; None if something was."""
        found = self.of(kind)
        if any(one.state != WAITING for one in found):
            return None
        return found[0].words if found else "nothing was logged of it"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; names nobody."""
        champion = self.champion
        return {
            "day": self.day.isoformat(),
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "champion": None if champion is None else champion.version,
            "trained_until": None if not champion or not champion.trained_until else champion.trained_until.isoformat(),
            "requests": self.requests,
            "comparisons": sum(one.state != WAITING for one in self.findings),
            "alarms": [f"{one.kind}: {one.name} ({one.test}, {one.against})" for one in self.alarms],
            "severe": [f"{one.kind}: {one.name} ({one.test}, {one.against})" for one in self.severe],
            "findings": [asdict(one) for one in self.findings],
            "calibration": None if self.curve is None else asdict(self.curve),
            "freshness_days_behind": self.freshness,
            "psi_from_training_set": self.trained,
        }

    def plots(self) -> dict[str, Draw]:
        found: dict[str, Draw] = {
            "distances": partial(plots.draw_distances, self.findings),
            "picks": partial(plots.draw_labels, self.days, self.history),
        }
        if self.curve is not None:
            found["reliability"] = partial(plots.draw_reliability, self.curve.curve)
        return found


def drift_report(url: str, lake: Lake, artifacts_url: str, day: date, progress: Say = silent) -> DriftReport:
    """Compare what was served until the end of `day` (UTC); what later reports compare with is kept in the database."""
    with psycopg.connect(url, options="-c TimeZone=UTC", application_name="larder-drift") as connection:
        champion = read_champion(connection)
        version = champion.version if champion else None
        categories = load_categories(connection)
        since = serving_since(connection)
        comparisons: list[Comparison] = []
        curve, requests = None, 0
        for span_days in (DAY, WEEK):
            window = Window.ending(day, span_days)
            answered = read_requests(connection, window)
            served = [one for one in answered if one.usual]
            current: dict[Name, Kept] = {
                **feature_sketches(connection, window),
                **request_sketches(served, version, categories),
            }
            found = None
            if outcomes_known(connection, lake, window):
                outcomes = read_outcomes(connection, lake, window)
                means, found = calibrated(served, outcomes, version, champion.calibration if champion else None)
                current |= label_means(served, outcomes, version) | means
            sketches.keep(connection, day, span_days, current)
            references = sketches.kept_windows(connection, whole(days_before(day), span_days, since), span_days)
            comparisons.append(comparison(span_days, current, references))
            progress(f"{window.first} to {window.last}: {len(answered):,} requests, {len(current)} things to compare")
            if span_days == WEEK:
                curve, requests = found, len(answered)
                if champion and champion.trained_until:
                    comparisons.append(_since_training(connection, day, current, champion.trained_until, since))
        asked = sum(len(tests_of(kept)) for one in comparisons for kept in one.current.values())
        findings = judge(comparisons, others=2)
        findings += _vectors(connection, lake, day, version, level(asked + 2), since)
        days = [day - timedelta(days=back) for back in range(SHOWN_DAYS - 1, -1, -1)]
        kept = sketches.kept_windows(connection, days, DAY)
        return DriftReport(
            day,
            champion,
            requests,
            findings,
            curve,
            freshness(connection, day),
            _from_training_set(artifacts_url, comparisons[1].current),
            {name: [_mean(one, name, version) for one in kept] for name in ("reciprocal_rank", "pick_rate")},
            days,
        )


def read_champion(connection: psycopg.Connection[Any]) -> Champion | None:
    """The model that serves; None while the floor does."""
    row = connection.execute(
        "SELECT v.version, v.manifest->>'trained_until', v.manifest->'quality'->'calibration' FROM model_aliases AS a "
        "JOIN model_versions AS v USING (version) WHERE a.alias = 'champion'"
    ).fetchone()
    if row is None:
        return None
    version, until, told = row
    known = datetime.fromisoformat(until) if until else None
    if known is not None and known.tzinfo is None:
        known = known.replace(tzinfo=UTC)
    return Champion(version, known, (float(told["scale"]), float(told["offset"])) if told else None)


def serving_since(connection: psycopg.Connection[Any]) -> date | None:
    """The first day (UTC) known to have been served: its answers are logged, or were, and a sketch of it is left; else None."""
    row = connection.execute(
        "SELECT least((SELECT (min(served_at) AT TIME ZONE 'UTC')::date FROM served_requests), "
        "(SELECT min(day) FROM drift_sketches WHERE span_days = %s))",
        (DAY,),
    ).fetchone()
    return row[0] if row else None


def whole(ends: Sequence[date], span_days: int, since: date | None) -> list[date]:
    """Those of the windows' last days whose window lies within what was served since the first day `since`.

    What people do changes on the day that lists begin to be served: before it, and in a week that it cuts in two, they are
    not those that today's are to be like. None: nothing was served yet, so nothing can be compared.
    """
    return [] if since is None else [end for end in ends if end - timedelta(days=span_days - 1) >= since]


def freshness(connection: psycopg.Connection[Any], day: date) -> dict[str, int | None]:
    """How many days behind `day` the newest events and each view's newest partition are."""
    newest = dict(
        connection.execute(
            "SELECT view, max(partition_date) FROM feature_ledger GROUP BY view "
            "UNION ALL SELECT 'events', max(day) FROM lake_files"
        ).fetchall()
    )
    names = ("events", *(view.name for view in VIEWS))
    return {name: None if newest.get(name) is None else max(0, (day - newest[name]).days) for name in names}


def _since_training(
    connection: psycopg.Connection[Any],
    day: date,
    current: Mapping[Name, Kept],
    trained_until: datetime,
    since: date | None,
) -> Comparison:
    """The week against the last ones that the champion learned from."""
    ends = whole(days_of_training(day, trained_until), WEEK, since)
    references = sketches.kept_windows(connection, ends, WEEK)
    return since_training(current, references)


def _from_training_set(artifacts_url: str, current: Mapping[Name, Kept]) -> dict[str, float]:
    """PSI of the week's people from the people of the training set last written, each by their newest label.

    Only told, never an alarm: a label stands in the middle of what a person does, a request before it, so their ages
    differ by right.
    """
    try:
        table = pq.read_table(io.BytesIO(artifacts.get(artifacts_url, TRAINING_SET)))
    except ArtifactError:
        return {}
    if (table.schema.metadata or {}).get(b"features", b"").decode() != ",".join(context_features()):
        return {}
    width = len(context_features())
    values, mask = (
        np.asarray(table[name].combine_chunks().flatten(), np.float32).reshape(-1, width)
        for name in ("context", "context_mask")
    )
    values = np.where(mask > 0, values, np.float32(np.nan))
    newest = {user_id: row for row, user_id in enumerate(table["user_id"].to_pylist())}  # rows are in order of time
    rows = np.fromiter(newest.values(), np.int64, len(newest))
    found: dict[str, float] = {}
    versions = {view.name: fingerprint((view,)) for view in CONTEXT_VIEWS}
    for place, name in enumerate(context_features()):
        kept = current.get(Name(FEATURES, name, versions[name.partition(".")[0]]))
        if isinstance(kept, sketches.Sketch) and min(kept.clusters, len(rows)) >= sketches.LEAST_CLUSTERS:
            found[name] = psi(kept, [sketch(values[rows, place], len(rows))])[0]
    return found


def _vectors(
    connection: psycopg.Connection[Any], lake: Lake, day: date, version: str | None, alpha: float, since: date | None
) -> list[Finding]:
    """What people took, and what they were shown, in the week and in the weeks before."""
    windows = [Window.ending(last, WEEK) for last in (*whole(days_before(day), WEEK, since), day)]
    reads: dict[str, Callable[[Window], Mapping[str, list[str]]]] = {
        "taken": lambda window: taken(lake, connection, window),
        "shown": lambda window: shown([one for one in read_requests(connection, window) if one.usual], version),
    }
    found = []
    for name, read in reads.items():
        *references, current = (person_vectors(connection, read(window)) for window in windows)
        found.append(compare_vectors(name, current, references, alpha))
    return found


def _mean(window: Mapping[Name, Kept], name: str, version: str | None) -> Mean | None:
    kept = window.get(Name(LABELS, name, version or ""))
    return kept if isinstance(kept, Mean) else None
