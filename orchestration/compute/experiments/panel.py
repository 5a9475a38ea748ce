"""People by day: what each was served and did in an experiment, and before it. No ids, no queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.experiments.metrics import PEOPLE, Metric
from orchestration.compute.experiments.ratios import moments

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Panel:
    """n people over d days as r rows, one for each person and day with something in it."""

    days: tuple[date, ...]
    arms: tuple[str, ...]
    arm: Ints
    """(n,) int64, index in `arms`"""
    first_day: Ints
    """(n,) int64, index in `days` of the first answer"""
    person: Ints
    """(r,) int64"""
    day: Ints
    """(r,) int64, index in `days`: of the answer, or of what was done"""
    counts: Mapping[str, Array]
    """(r,) float64 each, by the names of metrics.py"""
    before: Mapping[str, Array]
    """(n,) float64 each: the same counts over the weeks before the experiment"""
    events_before: Array
    """(n,) float64, events of any kind in those weeks"""
    segments: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """(n,) bool each, by what is said of them: known before the experiment, so no arm moves anybody between them"""
    in_two_arms: int = 0
    """People who were served by more than one arm; they count in their first."""
    shares_changed: str | None = None
    """Until when answers of other shares were served; those are left out."""

    @property
    def people(self) -> int:
        return len(self.arm)

    def arrivals(self) -> Array:
        """`(d, arms)`: people in each arm by the end of each day."""
        found = np.zeros((len(self.days), len(self.arms)))
        np.add.at(found, (self.first_day, self.arm), 1.0)
        return np.asarray(found.cumsum(axis=0))

    def has(self, metric: Metric) -> bool:
        """Whether anything at all was counted for it: a deployment without a survey has no answers."""
        return metric.denominator == PEOPLE or bool(self.counts[metric.denominator].any())

    def moments(self, metric: Metric, members: NDArray[np.bool_] | None = None, *, last: bool = False) -> list[Array]:
        """For each arm `(d, m, m)`: the moments of `metric` at the end of each day (`ratios.moments`), of `members` only;
        `last` gives the last day's alone, `(1, m, m)`."""
        known = self._covariates(metric)
        per_day = [self._by_day(metric.numerator), self._by_day(metric.denominator)]
        days = range(len(self.days))
        if last:
            per_day, days = [counts.sum(axis=1, keepdims=True) for counts in per_day], range(1)
        arms = []
        for arm in range(len(self.arms)):
            mine = np.flatnonzero((self.arm == arm) & (True if members is None else members))
            sums = []
            y, x = np.zeros(len(mine)), np.zeros(len(mine))
            for day in days:
                y, x = y + per_day[0][mine, day], x + per_day[1][mine, day]
                here = self.first_day[mine] <= (len(self.days) if last else day)
                sums.append(moments(y[here], x[here], known[mine[here]]))
            arms.append(np.stack(sums))
        return arms

    def _by_day(self, name: str) -> Array:
        """`(n, d)`: one count of every person on every day."""
        found = np.zeros((self.people, len(self.days)))
        if name == PEOPLE:
            found[np.arange(self.people), self.first_day] = 1.0
        else:
            np.add.at(found, (self.person, self.day), self.counts[name])
        return found

    def _covariates(self, metric: Metric) -> Array:
        """`(n, 3)`: what each person did of this metric before, beyond what was usual; how active they were; whether new."""
        one = np.ones(self.people)
        numerator = self.before.get(metric.numerator, 0 * one)
        denominator = one if metric.denominator == PEOPLE else self.before.get(metric.denominator, 0 * one)
        total = denominator.sum()
        usual = numerator.sum() / total if total else 0.0
        return np.stack(
            [numerator - usual * denominator, np.log1p(self.events_before), self.events_before > 0], axis=1
        ).astype(np.float64)
