"""Verdicts: from intervals to one of four, and what they say."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from inference.declared import Declared, stopped_place
from orchestration.compute.experiments.analysis import Report, analyse, to_json
from orchestration.compute.experiments.decide import State, Verdict
from orchestration.compute.experiments.declared import Arm, Experiment, read_declared
from orchestration.compute.experiments.metrics import COUNTS, metrics
from orchestration.compute.experiments.panel import Panel
from orchestration.compute.experiments.picture import picture
from orchestration.compute.experiments.stops import read_stops, stop
from schemas.errors import DefinitionError

START = datetime(2030, 1, 1, tzinfo=UTC)
NOW = START + timedelta(days=10)


def panel(
    seed: int,
    people: int = 6_000,
    *,
    click: float = 0.0,
    hide: float = 0.0,
    share: float = 0.5,
    arms: tuple[str, ...] = ("control", "new"),
) -> Panel:
    """Ten days in which everybody comes on two days and is shown ten items each; lifts are those of the last arm."""
    rng = np.random.default_rng((900, seed))
    arm = np.where(rng.random(people) < share, len(arms) - 1, rng.integers(0, len(arms) - 1, people))
    treated = arm == len(arms) - 1
    rate = rng.beta(8, 32, people)
    first = rng.integers(0, 9, people)
    person = np.repeat(np.arange(people), 2)
    day = np.stack([first, first + 1], axis=1).ravel()
    n = len(person)
    counts = {name: np.zeros(n) for name in COUNTS}
    counts |= {"requests": np.ones(n), "shown": np.full(n, 10.0)}
    counts["clicks"] = rng.binomial(10, (rate * (1 + click * treated))[person]).astype(float)
    counts["hides"] = rng.binomial(10, (0.05 * (1 + hide * treated))[person]).astype(float)
    before = {name: np.zeros(people) for name in COUNTS}
    before["shown"] = 10.0 * rng.poisson(4, people)
    before["clicks"] = rng.binomial(before["shown"].astype(int), rate).astype(float)
    return Panel(
        days=tuple(date(2030, 1, 1) + timedelta(days=n) for n in range(10)),
        arms=arms,
        arm=arm,
        first_day=first,
        person=person,
        day=day,
        counts=counts,
        before=before,
        events_before=before["shown"],
        segments={"everybody": np.ones(people, bool), "a few": np.arange(people) < 100},
    )


def experiment(
    *arms: Arm,
    guardrails: tuple[str, ...] = ("hide_rate",),
    end: datetime | None = None,
    judged: tuple[str, ...] = ("click_rate",),
) -> Experiment:
    shown = arms or (Arm("control", 0.5), Arm("new", 0.5))
    return Experiment("trial", START, end, shown, (), metrics(judged), metrics(guardrails))


def test_a_gain_with_its_guardrails_kept_is_shipped() -> None:
    report = analyse(experiment(), panel(1, 24_000, click=0.08, hide=-0.05), NOW)
    assert report.decision.verdict is Verdict.SHIP
    assert report.decision.words.startswith("ship new: new is better in clicks per shown item (+")
    assert "keeps hides per shown item" in report.decision.words
    [found] = report.findings
    assert found.low is not None
    assert found.low > 0
    assert found.p < 0.05
    # People's clicks before told a part of their clicks now.
    assert found.variance_left is not None
    assert found.variance_left < 0.9


def test_a_gain_waits_for_its_guardrails() -> None:
    report = analyse(experiment(), panel(2, 2_500, click=0.2), NOW)
    assert report.decision.verdict is Verdict.KEEP_RUNNING
    assert "it is not known yet whether new keeps hides per shown item" in report.decision.words


def test_harm_stops_whatever_is_gained() -> None:
    report = analyse(experiment(), panel(3, 12_000, click=0.1, hide=0.5), NOW)
    assert report.decision.verdict is Verdict.STOP
    assert [guard.metric.name for guard in report.decision.breached] == ["hide_rate"]
    assert "breaks the guardrail hides per shown item" in report.decision.words


def test_harm_within_the_margin_is_no_breach() -> None:
    # Two in a hundred worse, known to be below the ten in a hundred that are allowed.
    report = analyse(experiment(), panel(4, 120_000, hide=0.02), NOW)
    [guard] = report.guards
    assert guard.state is State.KEPT
    assert guard.at_most is not None
    assert guard.at_most < 0.1


def test_a_loss_in_what_was_to_be_gained_stops() -> None:
    report = analyse(experiment(), panel(5, 12_000, click=-0.1), NOW)
    assert report.decision.verdict is Verdict.STOP
    assert "new is worse in clicks per shown item" in report.decision.words
    assert report.decision.breached == ()


def test_nothing_to_gain_stops_and_nothing_known_goes_on() -> None:
    flat = analyse(experiment(), panel(6, 40_000), NOW)
    assert flat.decision.verdict is Verdict.STOP
    assert "gains less than 5%" in flat.decision.words
    young = analyse(experiment(), panel(7, 1_000), NOW)
    assert young.decision.verdict is Verdict.KEEP_RUNNING
    assert any("people in control and new together" in note for note in young.notes)
    tiny = analyse(experiment(), panel(8, 300), NOW)
    assert "it is too early to say anything" in tiny.decision.words
    assert tiny.findings[0].lift is None


def test_an_end_without_a_finding_is_an_end() -> None:
    report = analyse(experiment(end=NOW - timedelta(hours=1)), panel(7, 1_000), NOW)
    assert report.decision.verdict is Verdict.STOP
    assert "it ended on 2030-01-10 without a finding" in report.decision.words


def test_a_broken_split_comes_before_everything() -> None:
    report = analyse(experiment(), panel(9, 12_000, click=0.2, hide=0.5, share=0.45), NOW)
    assert report.decision.verdict is Verdict.BROKEN_SPLIT
    assert "nothing below can be trusted" in report.decision.words
    assert report.decision.breached == ()


def test_more_arms_and_metrics_make_wider_intervals() -> None:
    arms = (Arm("control", 1 / 3), Arm("one", 1 / 3), Arm("new", 1 / 3))
    many = panel(10, 18_000, click=0.2, share=1 / 3, arms=("control", "one", "new"))
    alone = analyse(experiment(*arms), many, NOW)
    more = analyse(experiment(*arms, judged=("click_rate", "clicks_per_person", "clicked_request_rate")), many, NOW)
    widths = [
        next(
            one.high - one.low
            for one in report.findings
            if one.arm == "new" and one.high is not None and one.low is not None
        )
        for report in (alone, more)
    ]
    assert widths[1] > 1.05 * widths[0]
    assert {one.arm for one in alone.findings} == {"one", "new"}
    assert alone.decision.arm == "new"


def test_segments_show_and_decide_nothing() -> None:
    report = analyse(experiment(), panel(1, 24_000, click=0.08), NOW)
    everybody, few = report.segments
    assert everybody.lift == pytest.approx(report.findings[0].lift)
    assert few.people == 100
    assert few.lift is None


def test_metrics_without_data_are_named() -> None:
    report = analyse(experiment(judged=("click_rate", "satisfaction")), panel(11), NOW)
    assert [one.metric.name for one in report.findings] == ["click_rate"]
    assert "nothing to judge satisfaction in the survey by" in report.notes[0]


def test_a_report_is_a_file_and_a_picture() -> None:
    report = analyse(experiment(), panel(1, 24_000, click=0.08), NOW)
    document = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert document["verdict"] == report.decision.verdict
    assert document["arms"]["new"]["people"] + document["arms"]["control"]["people"] == 24_000
    assert len(document["by_day"]["click_rate new"]) == 10
    drawn = picture(report)
    assert drawn.startswith(b"\x89PNG")
    assert drawn != picture(dataclasses.replace(report, series=report.series[:0]))
    empty: Report = analyse(experiment(), panel(8, 20), NOW)
    assert picture(empty).startswith(b"\x89PNG")


def test_a_stop_is_recorded_once_and_whole(tmp_path: Path) -> None:
    place = stopped_place(str(tmp_path / "experiments.toml"))
    file = tmp_path / "experiments.stopped.json"
    assert place == str(file)
    assert read_stops(place) == {}
    assert stop(place, "one", START, "harm")
    assert not stop(place, "one", NOW, "something else")
    assert stop(place, "two", NOW, "also")
    assert read_stops(place) == {"one": (START, "harm"), "two": (NOW, "also")}
    assert json.loads(file.read_text())["one"] == {"stopped_at": START.isoformat(), "reason": "harm"}
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]
    file.write_text("[]")
    with pytest.raises(DefinitionError, match="mend it, or remove it"):
        read_stops(place)


def test_what_is_declared_in_a_bucket_is_analysed_and_stopped_there(s3_bucket: str) -> None:
    import boto3

    place = f"{s3_bucket}/of/experiments.toml"
    assert read_declared(place) == {}
    text = (
        "[experiments.one]\nstart = 2030-01-01T02:00:00+02:00\nmetrics = ['click_rate']\n"
        "[experiments.one.arms.new]\nshare = 0.5\n[experiments.one.arms.control]\nshare = 0.5\n"
    )
    boto3.client("s3").put_object(Bucket=s3_bucket.removeprefix("s3://"), Key="of/experiments.toml", Body=text.encode())
    [found] = read_declared(place).values()
    assert isinstance(found, Experiment)
    assert (found.start, [arm.name for arm in found.arms]) == (datetime(2030, 1, 1, tzinfo=UTC), ["control", "new"])
    later = found.start + timedelta(days=1)
    assert stop(stopped_place(place), "one", later, "harm")
    # Who assigns people sees it as well.
    [assigned] = Declared(place).changed() or ()
    assert assigned.end == later
