"""What must hold of every partition of a view or of the events: declared here, measured where the partition is built.

A *blocking* check that fails stops everything made from that partition in the same run; the others warn. The numbers
stand in the partition's metadata either way, so that a limit can be chosen by looking at them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from schemas.errors import DefinitionError

Measures = Mapping[str, float]
"""What was measured of one partition, by name; a name that is missing could not be measured."""


@dataclass(frozen=True, slots=True)
class Check:
    """`low <= measure <= high` for one measure; None leaves that side open.

    `at_least_rows`: partitions with fewer rows are not judged (ratios of small numbers mean nothing). `counts` names the
    measures that count them; the largest decides.
    """

    name: str
    measure: str
    description: str
    low: float | None = None
    high: float | None = None
    blocking: bool = False
    at_least_rows: int = 0
    counts: tuple[str, ...] = ("rows",)

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise DefinitionError(f"check {self.name!r} has neither low nor high; give it at least one limit")
        if self.low is not None and self.high is not None and self.high < self.low:
            raise DefinitionError(f"check {self.name!r} wants {self.low} to {self.high}; turn the limits round")

    def holds(self, measures: Measures) -> bool:
        """True unless the measure is there and outside the limits."""
        value = measures.get(self.measure)
        if value is None or max(measures.get(name, 0) for name in self.counts) < self.at_least_rows:
            return True
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def null_rate(high: float, *, blocking: bool = False) -> Check:
    """The worst feature column of the partition is NULL in at most this share (0–1) of its rows."""
    return Check(
        "null_rates",
        "null_rate",
        f"No feature is NULL in more than {high:.0%} of a day's rows.",
        high=high,
        blocking=blocking,
        at_least_rows=100,
    )


def values_in_range(*, blocking: bool = True) -> Check:
    """Every finished value lies within the limits that its feature declares (`Feature.low`, `Feature.high`)."""
    return Check(
        "values_in_range",
        "out_of_range",
        "Every feature's value lies within its declared limits: counts are not negative, rates lie between 0 and 1.",
        high=0,
        blocking=blocking,
    )


def rows_against_day_before(low: float, high: float, *, blocking: bool = False) -> Check:
    """The partition has between `low` and `high` times the rows of the day before, if that was not the source's first."""
    return Check(
        "rows_against_day_before",
        "rows_over_day_before",
        f"A day has {low:g} to {high:g} times the rows of the day before.",
        low=low,
        high=high,
        blocking=blocking,
        at_least_rows=100,
        counts=("rows", "rows_day_before"),  # a day that lost nearly everything has few rows itself
    )


def late_events(high: float, *, blocking: bool = False) -> Check:
    """At most this share (0–1) of the day's events was learned of after their day had ended."""
    return Check(
        "late_events",
        "late_rate",
        f"At most {high:.0%} of a day's events were learned of after the day had ended.",
        high=high,
        blocking=blocking,
        at_least_rows=100,
    )


VIEW_CHECKS: tuple[Check, ...] = (values_in_range(), null_rate(0.95), rows_against_day_before(0.5, 2.0))
"""What a view is held to unless it says otherwise: impossible values block, the rest warns."""

EVENT_CHECKS: tuple[Check, ...] = (
    Check(
        "lake_agrees",
        "rows_off",
        "A day's file holds exactly the events that the lake's index says.",
        low=0,
        high=0,
        blocking=True,
    ),
    rows_against_day_before(0.2, 5.0),
    late_events(0.05),
)
"""What a day of events is held to. Days differ more than snapshots over long windows, so the band is wider."""
