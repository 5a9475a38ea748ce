"""What happens between two days: events go to the lake, features and lists are made anew, and what was served is watched."""

from __future__ import annotations

from inference.encoder import TextEncoder
from inference.runtime import LarderApplication
from orchestration.compute.drift.judge import WAITING, Finding
from orchestration.compute.drift.report import CURED_BY_TRAINING, drift_report
from orchestration.compute.engines import DuckDB
from orchestration.compute.experiments.reports import Reported, report_all
from orchestration.compute.ingest import drain, ingest
from orchestration.compute.interactions import load_interactions
from orchestration.compute.lists import refresh_co_visitation, refresh_popular_items
from orchestration.compute.materialise import materialise
from orchestration.compute.report_files import write_report
from orchestration.compute.telling import Say
from orchestration.compute.vectors import refresh_item_vectors, refresh_text_vectors, versions_to_refresh
from orchestration.month.place import Place
from orchestration.month.plan import Plan
from orchestration.month.serve import Street
from orchestration.month.story import Day, Drift, Estimate, Story
from schemas.views import VIEWS

METRIC = "click_rate"


def first_night(place: Place, plan: Plan, street: Street, encoder: TextEncoder, say: Say) -> None:
    """Load everything from before the month, and build what the first training and the first day read."""
    part = street.organic.part(None, plan.midnight(1))
    with place.connect() as connection:
        report = ingest(part, place.lake, connection, now=plan.midnight(1))
    say(f"{report.stored:,} events of {report.people:,} people with {report.items:,} items before the first day")
    street.remember((event.user_id, event.item_id) for event in part.happened)
    say("features, lists and text vectors for the first day")
    _make_anew(place, plan, 1, encoder)


def night(app: LarderApplication, place: Place, plan: Plan, street: Street, number: int, encoder: TextEncoder) -> None:
    """End day `number`: the next one knows what happened on it."""
    app.flush(60_000)
    end = plan.midnight(number + 1)
    part = street.organic.part(plan.midnight(number), end, street.taken)
    street.taken.clear()
    with place.connect() as connection:
        # The database's own clock wrote when these were known: the time of this simulation, months away from theirs. In
        # the month's story they were known at once.
        connection.execute(
            "UPDATE recent_events SET known_at = occurred_at WHERE NOT drained AND known_at <> occurred_at"
        )
        connection.commit()
        drain(connection, place.lake, plan.date(number), plan.date(number), now=end)
        ingest(part, place.lake, connection, now=end)
    street.remember((event.user_id, event.item_id) for event in part.happened)
    _make_anew(place, plan, number + 1, encoder)


def _make_anew(place: Place, plan: Plan, number: int, encoder: TextEncoder) -> None:
    """What day `number` reads: texts, lists, yesterday's features, item vectors of every version that may serve."""
    yesterday = plan.date(number - 1)
    with place.connect() as connection:
        refresh_text_vectors(connection, encoder)
        interactions = load_interactions(place.lake, connection)
        refresh_co_visitation(connection, interactions)
        refresh_popular_items(connection, interactions, plan.midnight(number))
        connection.commit()
        with DuckDB() as engine:
            for view in VIEWS:
                materialise(view, yesterday, yesterday, url=place.url, lake=place.lake, engine=engine)
        for _, path in versions_to_refresh(connection):
            refresh_item_vectors(connection, place.artifacts / path, encoder)


def watch_drift(place: Place, plan: Plan, number: int) -> Drift:
    """The product's drift report of day `number`; written out where it raises an alarm."""
    report = drift_report(place.url, place.lake, place.artifacts_url, plan.date(number))
    if report.alarms:
        write_report(place.folder, "drift", report.day, report.to_dict(), report.plots())
    reach: dict[str, float] = {}
    for one in report.findings:
        if one.state != WAITING and one.kind in CURED_BY_TRAINING:
            reach[one.kind] = max(reach.get(one.kind, 0.0), abs(one.distance) / max(one.enough, 1e-9))
    return Drift(
        [_told(one) for one in report.alarms],
        [_told(one) for one in report.severe],
        reach,
    )


def watch_experiments(place: Place, plan: Plan, story: Story, day: Day) -> None:
    """The product's experiment reports at the end of a day; a broken guardrail stops its experiment in them."""
    if not any(trial.first <= day.number <= trial.last for trial in plan.trials):
        return
    end = plan.midnight(day.number + 1)
    with place.connect() as connection:
        found = report_all(connection, place.lake, place.folder, place.artifacts_url, str(place.experiments), end)
    for one in found:
        trial = next(trial for trial in plan.trials if trial.name == one.name)
        if trial.first <= day.number <= trial.last:
            made = _estimate(day.number, one)
            before = story.estimates.setdefault(one.name, [])
            if not before or (before[-1].verdict, before[-1].done) != (made.verdict, made.done):
                day.happened.append(f"experiment {one.name}: {made.verdict}")
            day.happened += [f"experiment {one.name} {line}" for line in made.done]
            before.append(made)


def _estimate(number: int, reported: Reported) -> Estimate:
    report = reported.report
    if report is None:
        return Estimate(number, 0, None, None, None, "no data", reported.reason or "", ())
    found = next((one for one in report.findings if one.metric.name == METRIC), None)
    lift, low, high = (found.lift, found.low, found.high) if found else (None, None, None)
    decision = report.decision
    return Estimate(number, report.people, lift, low, high, str(decision.verdict), decision.words, reported.done)


def _told(one: Finding) -> str:
    return f"{one.kind}: {one.name} ({one.test}, {one.against})"
