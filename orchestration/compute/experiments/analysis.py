"""One experiment analysed: the split, every metric, guardrail and segment at every day's end, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.experiments.decide import (
    Decision,
    Finding,
    Guard,
    State,
    decide,
    guard_words,
    judge_guardrail,
    judge_metric,
    metric_words,
)
from orchestration.compute.experiments.declared import Experiment
from orchestration.compute.experiments.metrics import Metric
from orchestration.compute.experiments.panel import Panel
from orchestration.compute.experiments.planner import plan
from orchestration.compute.experiments.ratios import (
    CONTROL_ERROR_RATE,
    FIRST_LOOK_PEOPLE,
    Lift,
    lift_of,
    person_variance,
)
from orchestration.compute.experiments.sequential import ALPHA, half_width, one_sided_width, p_value, tune
from orchestration.compute.experiments.split import Split, judge_split

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Series:
    """A metric of an arm at the end of each day, `(d,)` each; NaN before enough was known."""

    metric: Metric
    arm: str
    lift: Array
    low: Array
    high: Array


@dataclass(frozen=True, slots=True)
class Segment:
    """A metric of an arm among some of the people; None where they are too few."""

    name: str
    metric: Metric
    arm: str
    people: int
    lift: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """What an experiment says at the end of its last day."""

    experiment: Experiment
    days: tuple[date, ...]
    people: int
    arrivals: Array
    """(d, arms), arms in the experiment's order"""
    split: Split
    findings: tuple[Finding, ...]
    guards: tuple[Guard, ...]
    segments: tuple[Segment, ...]
    series: tuple[Series, ...]
    decision: Decision
    notes: tuple[str, ...]
    """What a reader has to know besides: people in two arms, shares that changed, metrics without data, what is missing."""


def analyse(experiment: Experiment, panel: Panel, now: datetime, *, ended: bool | None = None) -> Report:
    """Judge what `panel` holds; `ended` says whether this is the last look (default: whether its end has passed)."""
    last_look = (experiment.end is not None and experiment.end <= now) if ended is None else ended
    arrivals = panel.arrivals()
    split = judge_split(arrivals, experiment.shares)
    broken = _broken(experiment, split) if split.broken(experiment.end is not None and experiment.end <= now) else None
    series: list[Series] = []
    findings: list[Finding] = []
    guards: list[Guard] = []
    notes = _notes(experiment, panel)
    metrics = [metric for metric in experiment.metrics if panel.has(metric)]
    guardrails = [metric for metric in experiment.guardrails if panel.has(metric)]
    alpha = ALPHA / max(1, len(metrics) * len(experiment.treated))
    stop_alpha = ALPHA / max(1, len(guardrails) * len(experiment.treated))
    ship_alpha = ALPHA / max(1, len(experiment.treated))
    for metric in dict.fromkeys((*metrics, *guardrails)):
        control, *treated = panel.moments(metric)
        for arm, sums in zip(experiment.treated, treated, strict=True):
            lift = lift_of(control, sums)
            if metric in metrics:
                one, line = _finding(metric, arm.name, lift, alpha)
                findings.append(one)
                series.append(line)
                if one.state is State.UNKNOWN and one.lift is not None:
                    notes += _missing(one, control[-1], experiment, panel, alpha)
            if metric in guardrails:
                guards.append(_guard(metric, arm.name, lift, stop_alpha, ship_alpha))
    decision = decide(
        [arm.name for arm in experiment.treated],
        findings,
        guards,
        broken=broken,
        ended_at=(experiment.end or now) if last_look else None,
    )
    segments = _segments(experiment, panel, metrics)
    return Report(
        experiment,
        panel.days,
        panel.people,
        arrivals,
        split,
        tuple(findings),
        tuple(guards),
        segments,
        tuple(series),
        decision,
        tuple(notes),
    )


def _finding(metric: Metric, arm: str, lift: Lift, alpha: float) -> tuple[Finding, Series]:
    tau = tune(metric.smallest_lift, alpha)
    ready = lift.ready
    width = half_width(np.where(ready, lift.se, 1.0), tau, alpha)
    low, high = np.where(ready, lift.lift - width, np.nan), np.where(ready, lift.lift + width, np.nan)
    series = Series(metric, arm, np.where(ready, lift.lift, np.nan), low, high)
    p = p_value(lift.lift[ready], lift.se[ready], tau).min(initial=1.0)
    people = int(lift.people[-1])
    if not ready[-1]:
        words = _too_early(metric, arm, people)
        unknown = Finding(metric, arm, None, None, None, None, None, float(p), people, None, State.UNKNOWN, words)
        return unknown, series
    numbers = (float(lift.lift[-1]), float(low[-1]), float(high[-1]))
    state = judge_metric(metric, *numbers[1:])
    made = Finding(
        metric,
        arm,
        float(lift.control[-1]),
        float(lift.treated[-1]),
        *numbers,
        float(p),
        people,
        float(lift.variance_left[-1]),
        state,
        metric_words(metric, arm, state, *numbers),
    )
    return made, series


def _guard(metric: Metric, arm: str, lift: Lift, stop_alpha: float, ship_alpha: float) -> Guard:
    people = int(lift.people[-1])
    if not lift.ready[-1]:
        return Guard(metric, arm, None, None, None, people, State.UNKNOWN, _too_early(metric, arm, people))
    harm, se = -metric.sign * float(lift.lift[-1]), float(lift.se[-1])
    # A one-sided bound at alpha is about as wide as half an interval at twice that.
    at_least = harm - float(one_sided_width(se, tune(metric.smallest_lift, 2 * stop_alpha), stop_alpha))
    at_most = harm + float(one_sided_width(se, tune(metric.smallest_lift, 2 * ship_alpha), ship_alpha))
    state = judge_guardrail(metric, at_least, at_most)
    words = guard_words(metric, arm, state, harm, at_least, at_most)
    return Guard(metric, arm, harm, at_least, at_most, people, state, words)


def _segments(experiment: Experiment, panel: Panel, metrics: list[Metric]) -> tuple[Segment, ...]:
    """Every metric of every arm in every segment that has anybody; all intervals hold together."""
    named = {name: members for name, members in panel.segments.items() if members.any()}
    alpha = ALPHA / max(1, len(named) * len(metrics) * len(experiment.treated))
    found = []
    for name, members in named.items():
        for metric in metrics:
            control, *treated = panel.moments(metric, members, last=True)
            for arm, sums in zip(experiment.treated, treated, strict=True):
                lift = lift_of(control[-1], sums[-1])
                numbers: tuple[float | None, ...] = (None, None, None)
                if lift.ready:
                    width = float(half_width(lift.se, tune(metric.smallest_lift, alpha), alpha))
                    numbers = (float(lift.lift), float(lift.lift) - width, float(lift.lift) + width)
                found.append(Segment(name, metric, arm.name, int(members.sum()), *numbers))
    return tuple(found)


def _broken(experiment: Experiment, split: Split) -> str:
    arms = ", ".join(
        f"{arm.name} {people:,} instead of {expected:,.0f}"
        for arm, people, expected in zip(experiment.arms, split.people, split.expected, strict=True)
    )
    return (
        f"broken split: {arms}; chance alone does so once in {_once_in(split)} experiments, so nothing below can be trusted. "
        "Look for answers that one arm lacks (errors, timeouts, rows of the log that were dropped) and start anew with "
        "another salt"
    )


def _once_in(split: Split) -> str:
    p = max(min(split.sequential_p, split.chi_square_p), 1e-9)
    return f"{1 / p:,.0f}" if p > 1e-9 else "more than 1,000,000,000"


def _too_early(metric: Metric, arm: str, people: int) -> str:
    return (
        f"it is too early to say anything of {metric.words} in {arm}: {people:,} people in the smaller arm, at least "
        f"{FIRST_LOOK_PEOPLE} are needed, and control's own figure known to {CONTROL_ERROR_RATE:.0%} of itself"
    )


def _missing(found: Finding, control: Array, experiment: Experiment, panel: Panel, alpha: float) -> list[str]:
    """How far the experiment is from finding the smallest lift that matters in this metric."""
    shares = {arm.name: arm.share for arm in experiment.arms}
    share = shares[found.arm] / (shares[found.arm] + experiment.control.share)
    needed = plan(found.metric.smallest_lift, person_variance(control), share=share, alpha=alpha)
    have = sum(
        int(count)
        for arm, count in zip(panel.arms, panel.arrivals()[-1], strict=True)
        if arm in (found.arm, experiment.control.name)
    )
    if have >= needed.people:
        return []
    return [
        f"a lift of {needed.lift:.0%} in {found.metric.words} is found with a power of {needed.power:.0%} by about "
        f"{needed.people:,} people in control and {found.arm} together; there are {have:,}"
    ]


def _notes(experiment: Experiment, panel: Panel) -> list[str]:
    notes = []
    if panel.shares_changed:
        notes.append(
            f"shares were changed: answers up to {panel.shares_changed} were given under others and are left out"
        )
    if panel.in_two_arms:
        notes.append(f"{panel.in_two_arms:,} people were served by more than one arm; they count in their first")
    for metric in dict.fromkeys((*experiment.metrics, *experiment.guardrails)):
        if not panel.has(metric):
            notes.append(f"there is nothing to judge {metric.words} by: no such event came in")
    return notes


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain values for a file; names nobody."""

    def one(row: Finding | Guard | Segment) -> dict[str, Any]:
        values = {name: getattr(row, name) for name in row.__slots__}
        return values | {"metric": row.metric.name}

    return {
        "experiment": report.experiment.name,
        "start": report.experiment.start.isoformat(),
        "end": report.experiment.end.isoformat() if report.experiment.end else None,
        "until": report.days[-1].isoformat(),
        "verdict": report.decision.verdict,
        "words": report.decision.words,
        "people": report.people,
        "arms": {
            arm.name: {"people": people, "expected": expected, "share": arm.share}
            for arm, people, expected in zip(
                report.experiment.arms, report.split.people, report.split.expected, strict=True
            )
        },
        "sample_ratio": {"sequential_p": report.split.sequential_p, "chi_square_p": report.split.chi_square_p},
        "metrics": [one(row) for row in report.findings],
        "guardrails": [one(row) for row in report.guards],
        "segments": [one(row) for row in report.segments],
        "by_day": {f"{line.metric.name} {line.arm}": _by_day(report.days, line) for line in report.series},
        "notes": list(report.notes),
    }


def _by_day(days: tuple[date, ...], line: Series) -> Mapping[str, list[float] | None]:
    return {
        day.isoformat(): None if np.isnan(lift) else [float(lift), float(low), float(high)]
        for day, lift, low, high in zip(days, line.lift, line.low, line.high, strict=True)
    }
