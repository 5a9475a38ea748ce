"""`make simulate-month` on a tiny world: the whole loop runs, and its report holds every part, truth beside estimates."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TODAY

from inference.experiment import read_experiments
from orchestration.month import judge, report, run
from orchestration.month.place import Place
from orchestration.month.plan import K, Plan
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
    items=150,
    events_per_person=25.0,
    visits=25,
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
    assert all(day.visits == 25 for day in story.days)
    # Ten candidates, which is what the careless arm has, are not always ten items.
    assert all(0 < day.shown <= 25 * K and (day.shown == 25 * K or "careless" in day.arms) for day in story.days)
    assert all(day.drift is not None and not day.degraded * story.models[0].passed for day in story.days)
    # The truth brackets what was shown, and what was clicked is drawn from it.
    assert all(day.best >= max(day.relevance, day.popular) for day in story.days)
    clicked, expected = sum(day.clicked for day in story.days), sum(day.clicks for day in story.days)
    assert abs(clicked - expected) < 4 * math.sqrt(expected)
    # Both experiments ran with everybody, and what each arm is worth to everybody is known.
    for trial in TINY.trials:
        arms = [day.arms[trial.name] for day in story.days if trial.name in day.arms]
        assert arms
        assert all(set(one) == {"control", trial.arm} for one in arms)
        assert all(sum(arm.lists for arm in one.values()) == 25 for one in arms)
        assert all(arm.asked == 25 for one in arms for arm in one.values())
        assert story.estimates[trial.name][-1].people > 0
    with place.connect() as connection:
        count = "SELECT count(*), count(*) FILTER (WHERE item_ids IS NULL) FROM served_requests"
        assert connection.execute(count).fetchone() == (150, 0)
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


def test_what_had_moved_before_the_drift_does_not_pass_for_finding_it() -> None:
    def day(number: int, alarms: list[str], severe: list[str]) -> Day:
        return Day(number, TINY.date(number), drift=Drift(alarms, severe, 2.0))

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
    assert plan.trials[-1].last < plan.drift_day + 1 < plan.rollback_day + 1 <= days
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
