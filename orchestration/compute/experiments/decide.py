"""From intervals to one verdict: of each metric and guardrail of an arm, of the arm, of the experiment. All in plain words.

What is claimed, and how often it may be wrong. All intervals hold at every look at once, so nothing here is corrected for
looking daily.

- A metric is better or worse: wrong with at most ALPHA in all, over all metrics and arms of an experiment (Bonferroni).
- A guardrail is breached (the arm does harm and is not shown to stay within the margin): wrong with at most ALPHA in all,
  over all guardrails and arms. This stops the experiment, so every guardrail is a chance to stop for nothing.
- A guardrail is kept (the harm is below the margin): wrong with at most ALPHA for each arm, uncorrected among guardrails,
  because shipping needs all of them (intersection-union test; Berger 1982).
- Segments are to look at. Their intervals hold together, and no verdict depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from orchestration.compute.experiments.metrics import Metric


class Verdict(StrEnum):
    """What to do now."""

    SHIP = "ship"
    STOP = "stop"
    KEEP_RUNNING = "keep running"
    BROKEN_SPLIT = "broken split"


class State(StrEnum):
    """What is known of a metric, or of a guardrail."""

    BETTER = "better"
    WORSE = "worse"
    TOO_SMALL = "too small"
    """A gain that would be worth acting on is ruled out."""
    KEPT = "kept"
    BREACHED = "breached"
    UNKNOWN = "not known yet"


@dataclass(frozen=True, slots=True)
class Finding:
    """A metric of an arm against control. `lift` is relative, `low` to `high` its interval; None before the first look.

    `p` is the least p-value of any look so far, of this one metric. `people` is the smaller of the two arms.
    """

    metric: Metric
    arm: str
    control: float | None
    treated: float | None
    lift: float | None
    low: float | None
    high: float | None
    p: float
    people: int
    variance_left: float | None
    state: State
    words: str


@dataclass(frozen=True, slots=True)
class Guard:
    """A guardrail of an arm. `harm` is how much worse it is than control, relative; it is between the two bounds, each of
    which holds on its own."""

    metric: Metric
    arm: str
    harm: float | None
    at_least: float | None
    at_most: float | None
    people: int
    state: State
    words: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done, why, and by which arm or guardrail it came to that."""

    verdict: Verdict
    words: str
    arm: str | None = None
    breached: tuple[Guard, ...] = ()


def judge_metric(metric: Metric, low: float, high: float) -> State:
    """From the interval of its lift."""
    worst, best = sorted((metric.sign * low, metric.sign * high))
    if worst > 0:
        return State.BETTER
    if best < 0:
        return State.WORSE
    return State.TOO_SMALL if best < metric.smallest_lift else State.UNKNOWN


def judge_guardrail(metric: Metric, at_least: float, at_most: float) -> State:
    """From the bounds of its harm."""
    if at_most < metric.margin:
        return State.KEPT
    return State.BREACHED if at_least > 0 else State.UNKNOWN


def metric_words(metric: Metric, arm: str, state: State, lift: float, low: float, high: float) -> str:
    """What is known of a metric, as a sentence."""
    interval = f"{lift:+.1%}, {low:+.1%} to {high:+.1%}"
    match state:
        case State.BETTER | State.WORSE:
            return f"{arm} is {state} in {metric.words} ({interval})"
        case State.TOO_SMALL:
            return f"{arm} gains less than {metric.smallest_lift:.0%} in {metric.words}, if anything ({interval})"
        case _:
            return f"it is not known yet whether {arm} is better in {metric.words} ({interval})"


def guard_words(metric: Metric, arm: str, state: State, harm: float, at_least: float, at_most: float) -> str:
    """What is known of a guardrail, as a sentence."""
    match state:
        case State.KEPT:
            return f"{arm} keeps {metric.words}: at most {max(at_most, 0):.1%} worse, {metric.margin:.0%} are allowed"
        case State.BREACHED:
            return (
                f"{arm} breaks the guardrail {metric.words}: {harm:.1%} worse, and at least {at_least:.1%}; "
                f"{metric.margin:.0%} are allowed"
            )
        case _:
            return (
                f"it is not known yet whether {arm} keeps {metric.words}: up to {at_most:.1%} worse is possible, "
                f"{metric.margin:.0%} are allowed"
            )


def decide(
    arms: Sequence[str],
    findings: Sequence[Finding],
    guards: Sequence[Guard],
    *,
    broken: str | None,
    ended_at: datetime | None,
) -> Decision:
    """The verdict of an experiment with the treated `arms`; `broken` says what is wrong with the split, if something is.

    A split that is broken comes before everything; then harm; then what to ship; an arm that may still win keeps it going.
    """
    if broken is not None:
        return Decision(Verdict.BROKEN_SPLIT, broken)
    breached = tuple(guard for guard in guards if guard.state is State.BREACHED)
    if breached:
        return Decision(
            Verdict.STOP, "stop: " + "; ".join(guard.words for guard in breached), breached[0].arm, breached
        )
    by_arm = [
        _decide_arm(
            arm,
            [one for one in findings if one.arm == arm],
            [one for one in guards if one.arm == arm],
            ended_at=ended_at,
        )
        for arm in arms
    ]
    if not by_arm:
        return Decision(Verdict.KEEP_RUNNING, "nothing is compared: only one arm is shown")
    for verdict in (Verdict.SHIP, Verdict.KEEP_RUNNING):
        chosen = [one for one in by_arm if one.verdict is verdict]
        if chosen:
            gain = {one.arm: _gain(one.arm, findings) for one in chosen}
            return max(chosen, key=lambda one: gain[one.arm])
    return by_arm[0] if len(by_arm) == 1 else Decision(Verdict.STOP, "; ".join(one.words for one in by_arm))


def _decide_arm(
    arm: str, findings: Sequence[Finding], guards: Sequence[Guard], *, ended_at: datetime | None
) -> Decision:
    worse = [one for one in findings if one.state is State.WORSE]
    better = [one for one in findings if one.state is State.BETTER]
    open_guards = [one for one in guards if one.state is State.UNKNOWN]
    if worse:
        return Decision(Verdict.STOP, "stop: " + "; ".join(one.words for one in worse), arm)
    if better and not open_guards:
        kept = "; " + "; ".join(one.words for one in guards) if guards else ""
        return Decision(Verdict.SHIP, f"ship {arm}: " + "; ".join(one.words for one in better) + kept, arm)
    if findings and all(one.state is State.TOO_SMALL for one in findings):
        return Decision(Verdict.STOP, "stop: " + "; ".join(one.words for one in findings), arm)
    waits = [one.words for one in (better or findings)] + [one.words for one in open_guards if better]
    reason = "; ".join(waits) or "no metric is declared"
    if ended_at is not None:
        return Decision(Verdict.STOP, f"stop: it ended on {ended_at:%Y-%m-%d} without a finding; {reason}", arm)
    return Decision(Verdict.KEEP_RUNNING, f"keep running: {reason}", arm)


def _gain(arm: str | None, findings: Sequence[Finding]) -> float:
    """The lift of the arm's first metric, the right way round."""
    first = next((one for one in findings if one.arm == arm), None)
    return -1.0 if first is None or first.lift is None else first.metric.sign * first.lift
