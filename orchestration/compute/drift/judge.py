"""What counts as drift: a window against those before it, with thresholds, their reasons, and few false alarms.

An alarm needs three things at once. **Not chance**: the p-value is below this report's share of `FALSE_ALARM_RATE`, which is
for a week of daily reports with all their comparisons together (Bonferroni: neighbouring days and features hang together,
and a bound that needs no independence is the honest one). **Large enough to matter**: at least `LEAST` of its test.
**Unusual**: `room` times what the windows before lie apart from each other, so that a trend that has always been there, such
as a history that grows, is no news.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from orchestration.compute.drift import statistics
from orchestration.compute.drift.sketches import (
    DAY,
    FEATURES,
    LEAST_CLUSTERS,
    REFERENCES,
    WEEK,
    Counts,
    Kept,
    Name,
    Sketch,
    Window,
    days_before,
)

FALSE_ALARM_RATE = 0.05
"""A quiet week may raise an alarm, whatever it is of, one time in twenty."""
LOOKS = 7
"""Reports a week."""
LEAST_REFERENCES = 2
"""Windows before that must be there: with one alone nothing tells what is usual."""

KS, PSI, CHI_SQUARE, MEANS, MMD = "ks", "psi", "chi-square", "means", "mmd"

LEAST = {
    KS: 0.1,
    PSI: 0.1,
    CHI_SQUARE: 0.2,
    MEANS: 0.2,
}
"""The least distance that matters.

KS 0.1: a shift by 0.5 standard deviations moves a normal distribution by 0.197 and a uniform one, the flattest, by 0.144.
PSI 0.1: the literature's border between none and moderate (Siddiqi 2006); the same shift of a normal one gives 0.25.
chi-square 0.2: Cohen's w between small (0.1) and medium (0.3): shares of categories follow the season by a tenth.
means 0.2: a fifth of the mean reciprocal rank or of the hit rate is what a model's whole lead over a floor is made of.
"""
LEAST_SINCE_TRAINING = {KS: 0.2, PSI: 0.25}
"""Of features against the champion's time, which may be months ago: PSI's border to major, and as much of the other. Shares
of categories are not compared with it: what people are shown goes round with the year."""

ALARM, QUIET, WAITING = "alarm", "quiet", "waiting"
TRAINING = "training"
"""The name of the comparison with the time that the champion learned from; the others are of a day or a week."""
SPANS = {DAY: "day", WEEK: "week"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison: `distance` from the windows before, the `least` that matters, the `usual` between those, `p`.

    `state` is alarm, quiet, or waiting where `words` says for what.
    """

    kind: str
    name: str
    test: str
    against: str
    state: str
    distance: float = 0.0
    p: float = 1.0
    least: float = 0.0
    usual: float = 0.0
    clusters: int = 0
    reference_clusters: int = 0
    references: int = 0
    words: str = ""

    @property
    def enough(self) -> float:
        """The distance from which on it is an alarm, if it is not chance."""
        return max(self.least, room(self.references) * self.usual)

    @property
    def severe(self) -> bool:
        """An alarm at twice the distance that would have been enough."""
        return self.state == ALARM and abs(self.distance) >= 2 * self.enough


@dataclass(frozen=True, slots=True)
class Comparison:
    """A window's sketches, those of the windows before, and the distances that matter."""

    against: str
    current: Window
    references: Sequence[Window]
    least: Mapping[str, float]


def comparison(span_days: int, current: Window, references: Sequence[Window]) -> Comparison:
    """A day or a week against the same before it."""
    return Comparison(SPANS[span_days], current, references, LEAST)


def since_training(current: Window, references: Sequence[Window]) -> Comparison:
    """A week's features against the weeks that the champion learned from."""
    features = {name: kept for name, kept in current.items() if name.kind == FEATURES}
    return Comparison(TRAINING, features, references, LEAST_SINCE_TRAINING)


def days_of_training(day: date, trained_until: datetime) -> list[date]:
    """The ends of the last weeks that the champion learned from, the oldest first, each a number of weeks before `day`.

    Those that a week is compared with anyway are not among them: that would be the same question twice.
    """
    last = min(trained_until.date() - timedelta(days=1), days_before(day)[0] - timedelta(days=7))
    weeks = -(-(day - last).days // 7)
    return [day - timedelta(days=7 * back) for back in range(weeks + REFERENCES - 1, weeks - 1, -1)]


def judge(comparisons: Sequence[Comparison], others: int = 0) -> list[Finding]:
    """A finding for every name and test. `others` is the number of comparisons that are judged elsewhere in the report."""
    asked = [(one, name, test) for one in comparisons for name in one.current for test in tests_of(one.current[name])]
    alpha = level(len(asked) + others)
    return [_judge(one, name, test, alpha) for one, name, test in asked]


def level(comparisons: int) -> float:
    """The p-value below which one of so many comparisons of a report is not chance."""
    return FALSE_ALARM_RATE / (LOOKS * max(comparisons, 1))


def tests_of(kept: Kept) -> tuple[str, ...]:
    """The tests that a sketch is put to."""
    if isinstance(kept, Sketch):
        return KS, PSI
    return (CHI_SQUARE,) if isinstance(kept, Counts) else (MEANS,)


def room(references: int) -> float:
    """How many times what the windows before lie apart from each other is still usual: 1.25 with four, 1.5 with three, 2 with two.

    Of n windows a week apart that move at one pace, the outermost lies n / 2 weeks from the mean of the others and the next one
    (n + 1) / 2 weeks from the mean of them all: a trend alone brings (n + 1) / n. And of few windows the furthest is a poor
    measure of what is usual, so that few leave more room than that.
    """
    return 1 + 0.5 ** max(references - 2, 0)


def decide(distance: float, p: float, *, least: float, usual: float, references: int, alpha: float) -> str:
    """Alarm or quiet, by the three conditions."""
    return ALARM if p < alpha and abs(distance) >= max(least, room(references) * usual) else QUIET


def _judge(one: Comparison, name: Name, test: str, alpha: float) -> Finding:
    current = one.current[name]
    references = [found for window in one.references if (found := window.get(name)) is not None]
    references = [found for found in references if found.clusters >= LEAST_CLUSTERS]
    about = (name.kind, name.name, test, one.against)
    if current.clusters < LEAST_CLUSTERS:
        words = f"{current.clusters} people or items; from {LEAST_CLUSTERS} on it is compared"
        return Finding(*about, WAITING, clusters=current.clusters, words=words)
    if len(references) < LEAST_REFERENCES:
        words = f"{len(references)} windows before with {LEAST_CLUSTERS} people or items; {LEAST_REFERENCES} are needed"
        return Finding(*about, WAITING, clusters=current.clusters, words=words)
    distance, p = _distance(test, current, references)
    usual = max(
        abs(_distance(test, references[place], [*references[:place], *references[place + 1 :]])[0])
        for place in range(len(references))
    )
    least = one.least[test]
    return Finding(
        *about,
        decide(distance, p, least=least, usual=usual, references=len(references), alpha=alpha),
        distance,
        p,
        least,
        usual,
        current.clusters,
        sum(found.clusters for found in references),
        len(references),
    )


def _distance(test: str, current: Any, references: Sequence[Any]) -> tuple[float, float]:
    if test == KS:
        return statistics.ks(current, references)
    if test == PSI:
        return statistics.psi(current, references)
    if test == CHI_SQUARE:
        return statistics.chi_square(current, references)
    return statistics.two_means(current, references)
