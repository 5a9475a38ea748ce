"""`make simulate-month` on a tiny world: the whole loop runs, and its report holds every part, truth beside estimates."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TODAY

from inference.experiment import read_experiments
from orchestration.compute.experiments.metrics import METRICS
from orchestration.compute.experiments.ratios import lift_of, moments
from orchestration.compute.experiments.sequential import one_sided_width, tune
from orchestration.month import judge, report, run
from orchestration.month.place import Place
from orchestration.month.plan import AS_IF_EVERY, K, Plan
from orchestration.month.power import guardrail_power
from orchestration.month.source import Organic
from orchestration.month.story import Day, Drift, Story
from orchestration.month.truth import DayTruth, clicks, examination, hides, taken
from orchestration.simulate_month import main
from orchestration.sources.simulator import Simulator
from schemas.errors import SettingsError

TINY = Plan(
    TODAY.date(),
    days=6,
    people=150,
    items=300,
    events_per_person=25.0,
    most_lists=24,
    epochs=1,
    slate_rows=200,
    history_days=40,
)


@pytest.mark.prove
def test_a_tiny_month_is_lived_and_told(database: str, tmp_path: Path) -> None:
    place = Place(database, tmp_path / "month")
    place.folder.mkdir()
    said: list[str] = []
    story, street = run.simulate(place, TINY, said.append)

    assert [day.number for day in story.days] == [1, 2, 3, 4, 5, 6]
    assert all(0 < day.visits <= 24 for day in story.days)
    assert [(day.number, day.visits, day.shown) for day in story.days if day.shown != day.visits * K] == []
    assert all(day.drift is not None and not day.degraded * story.models[0].passed for day in story.days)
    # The truth brackets what was shown, and what was clicked is drawn from it.
    assert all(day.best >= max(day.relevance, day.popular) for day in story.days)
    clicked, expected = sum(day.clicked for day in story.days), sum(day.clicks for day in story.days)
    assert abs(clicked - expected) < 4 * math.sqrt(expected)
    # Both experiments ran with everybody, and what each arm is worth is known of some of the same people in both.
    for trial in TINY.trials:
        days = [day for day in story.days if trial.name in day.arms]
        assert days
        assert all(set(day.arms[trial.name]) <= {"control", trial.arm} for day in days)
        assert all(sum(arm.lists for arm in day.arms[trial.name].values()) == day.visits for day in days)
        asked = [day.arms[trial.name][arm].asked for day in days for arm in ("control", trial.arm)]
        assert asked[::2] == asked[1::2] == [-(-day.visits // AS_IF_EVERY) for day in days]
        assert 0 <= story.power[trial.name].power <= 1
        assert story.power[trial.name].lists == sum(day.visits for day in days)
        assert story.estimates[trial.name][-1].people > 0
    with place.connect() as connection:
        count = "SELECT count(*), count(*) FILTER (WHERE item_ids IS NULL) FROM served_requests"
        assert connection.execute(count).fetchone() == (sum(day.visits for day in story.days), 0)
        assert connection.execute("SELECT count(*) FROM served_features").fetchone() != (0,)
        # Every click is an event with its list's id, known when it happened, and in the lake.
        posted = connection.execute(
            "SELECT count(*), count(*) FILTER (WHERE drained AND known_at = occurred_at) FROM recent_events WHERE request_id IS NOT NULL"
        ).fetchone()
        done = clicked + sum(day.hidden for day in story.days)
        assert posted == (done, done)

    fairness, segments = judge.judge_fairness(place, TINY, street, story)
    explored = judge.judge_exploration(place, TINY, street)
    out = tmp_path / "out"
    made = report.write(place.folder, out, TINY, story, fairness, segments, explored, 60.0)
    page = (made / "report.md").read_text()
    for part in (
        "as the product sees it | truth",
        "## Experiments",
        "True lift",
        "## Drift",
        "## Fairness",
        "## Day by day",
    ):
        assert part in page
    for picture in ("quality", "clicks", "experiments", "drift", "fairness"):
        assert f"({picture}.png)" in page
        assert (out / f"{picture}.png").stat().st_size > 2_000
    told = json.loads((place.folder / "reports" / "month" / "latest.json").read_text())
    assert set(told["drift"]) == {"began", "alarm", "severe_alarm", "alarms_before"}
    assert told["drift"]["began"] == TINY.drift_day
    assert told["experiments"]["careless"]["true_lift"] is not None
    assert len(told["days"]) == 6


def test_the_truth_is_the_simulators_and_people_act_by_it() -> None:
    until = TINY.midnight(3)
    simulator, organic = Simulator(TINY.world, until), Organic(TINY.world, until)
    who, items = sorted(organic.first_event)[:3], organic.available(TINY.midnight(1))
    truth = DayTruth.of(simulator, who, items, TINY.noon(1))
    assert truth.of_list(who[1], items[4:6]) == pytest.approx(
        simulator.relevance([who[1]] * 2, items[4:6], TINY.noon(1)).tolist()
    )
    row = truth.of_list(who[0], items)
    had = {items[int(row.argmax())]}
    assert truth.best(who[0], had, 3).tolist() == sorted(row.tolist(), reverse=True)[1:4]
    assert examination(3) == pytest.approx([1, 1 / math.log2(3), 0.5])
    assert taken(np.array([3.0])) == pytest.approx([0.5])
    better, worse = np.array([4.0, 4.0]), np.array([-1.0, -1.0])
    assert (clicks(better) > clicks(worse)).all()
    assert (hides(better) < hides(worse)).all()
    assert (clicks(worse) + hides(worse) <= examination(2)).all()


def test_the_worlds_events_come_once_each() -> None:
    organic = Organic(TINY.world, TINY.midnight(4))
    parts = [organic.part(None, TINY.midnight(1))]
    parts += [organic.part(TINY.midnight(n), TINY.midnight(n + 1)) for n in (1, 2, 3)]
    whole = Simulator(TINY.world, TINY.midnight(4))
    assert sorted(e.event_id for part in parts for e in part.happened) == sorted(e.event_id for e in whole.events())  # type: ignore[union-attr]
    assert [item for part in parts for item in part.catalogue] == list(whole.items())
    assert len({part.fingerprint() for part in parts}) == 4


def test_people_ask_when_they_come_by_and_what_they_take_they_do_not_look_for() -> None:
    organic = Organic(TINY.world, TINY.midnight(4))
    day = TINY.date(2)
    part = organic.part(TINY.midnight(2), TINY.midnight(3))
    sessions = organic.sessions(day)
    active = {event.user_id for event in part.happened}
    known = {who for who in active if organic.first_event[who] < TINY.midnight(2)}
    assert {who for _, who in sessions} == known < active
    assert sessions == sorted(sessions)
    begins = {(event.occurred_at, event.user_id) for event in part.happened}
    assert set(sessions) <= begins
    assert len(known) <= len(sessions) < len(part.happened)

    who = max(active, key=lambda one: sum(event.user_id == one for event in part.happened))
    mine = [event for event in part.happened if event.user_id == who]
    fewer = organic.part(TINY.midnight(2), TINY.midnight(3), {who: 2})
    assert [event for event in fewer.happened if event.user_id == who] == mine[:-2]
    assert len(fewer.happened) == len(part.happened) - 2
    none = organic.part(TINY.midnight(2), TINY.midnight(3), {who: 1_000})
    assert len(none.happened) == len(part.happened) - len(mine)


def test_the_reckoned_power_is_how_often_the_products_own_guardrail_breaks() -> None:
    """Experiments drawn as the reckoning supposes, each judged by the product at its last look."""
    trial, rng = TINY.trials[1], np.random.default_rng(1)
    visits = Counter({f"p{n}": 1 + n % 4 for n in range(700)})
    taste = {"control": rng.gamma(8, 0.15, 4_000), trial.arm: rng.gamma(8, 0.105, 4_000)}
    told = guardrail_power(trial, visits, taste, {arm: 0.88 * clicks for arm, clicks in taste.items()})
    assert told.harm == pytest.approx(0.3, abs=0.03)
    assert (told.people, told.lists) == (700, 1_750)
    times = np.array(list(visits.values()))
    metric, alpha, broken, runs = METRICS["click_rate"], 0.05 / 2, 0, 400
    for _ in range(runs):
        arm = rng.permutation(700) < 350
        rate = np.where(arm, rng.choice(taste[trial.arm], 700), rng.choice(taste["control"], 700))
        # Clicks on ten places: a mean of `rate` and, by a binomial, 0.88 of it as the variance.
        got = rng.binomial(10 * times, rate / 10)
        lift = lift_of(*(moments(got[part], K * times[part]) for part in (~arm, arm)))
        width = one_sided_width(lift.se, tune(metric.smallest_lift, 2 * alpha), alpha)
        broken += bool(-lift.lift - width > 0)
    assert broken / runs == pytest.approx(told.power, abs=0.07)
    assert 0.3 < told.power < 0.99
    sooner = guardrail_power(
        trial, Counter(dict.fromkeys(visits, 1)), taste, {arm: 0.88 * v for arm, v in taste.items()}
    )
    assert sooner.power < told.power


def test_what_had_moved_before_the_drift_does_not_pass_for_finding_it() -> None:
    def day(number: int, alarms: list[str], severe: list[str]) -> Day:
        return Day(number, TINY.date(number), drift=Drift(alarms, severe, {}))

    old, new = "features: user_activity.events_30d", "vectors: taken"
    days = [day(1, [], []), day(2, [f"{old} (ks, day)"], []), day(4, [f"{old} (psi, week)"], [f"{old} (psi, week)"])]
    story = Story(days=[*days, day(5, [f"{old} (ks, day)", f"{new} (mmd, week)"], [])])
    assert story.alarms_before(4) == {old: 2}
    assert story.alarm_since(4, severe=False) == (5, [new])
    assert story.alarm_since(4, severe=True) is None
    assert story.alarm_since(6, severe=False) is None


@pytest.mark.parametrize("days", [6, 7, 10, 30, 45, 60])
def test_a_calendar_of_any_length_declares_experiments_that_can_run(days: int) -> None:
    plan = replace(TINY, days=days)
    declared = read_experiments(plan.experiments())
    assert [one.name for one in declared] == [trial.name for trial in plan.trials]
    assert plan.trials[-1].last < plan.drift_day + 1 <= plan.training_day + 1 <= plan.rollback_day + 1 <= days
    with pytest.raises(SettingsError, match="DAYS from 6 to 60"):
        replace(TINY, days=5)


def test_a_wrong_argument_is_told_of_before_anything_is_removed(
    larder_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (larder_home / "month").mkdir(parents=True)
    (larder_home / "month" / "kept").touch()
    assert main(["--days", "3"]) == 1
    assert "give DAYS from 6 to 60" in capsys.readouterr().out
    (larder_home / "month" / "postgres").mkdir()
    (larder_home / "month" / "postgres" / "postmaster.pid").write_text(f"{os.getpid()}\n")
    assert main([]) == 1
    assert "is in use" in capsys.readouterr().out.replace("\n", " ")
    assert (larder_home / "month" / "kept").exists()
