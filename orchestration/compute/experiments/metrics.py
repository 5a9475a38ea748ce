"""What an experiment is judged by: each metric one declaration, a ratio of two counts that `reading` makes per person."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from schemas.errors import DefinitionError

ATTRIBUTED_DAYS = 7
"""An event counts for the recommendation whose request_id it carries if it came within so many days."""

# Counts of one person and day. The first three are of what was served, the others of outcomes.
REQUESTS, SHOWN, DEGRADED = "requests", "shown", "degraded"
CLICKS, CLICKED_REQUESTS, LIKES, HIDES, PURCHASES = "clicks", "clicked_requests", "likes", "hides", "purchases"
DWELL_SECONDS, DWELLS = "dwell_seconds", "dwells"
SATISFACTION, SATISFACTION_ANSWERS = "satisfaction", "satisfaction_answers"
TRUST, TRUST_ANSWERS = "trust", "trust_answers"
COUNTS = (
    REQUESTS, SHOWN, DEGRADED, CLICKS, CLICKED_REQUESTS, LIKES, HIDES, PURCHASES, DWELL_SECONDS, DWELLS, SATISFACTION,
    SATISFACTION_ANSWERS, TRUST, TRUST_ANSWERS,
)  # fmt: skip
PEOPLE = "people"
"""1 for everybody who was served: the denominator of a mean per person."""

CLICK_KINDS = ("view", "click", "rating", "like", "purchase")
"""Kinds of events that say that a shown item was taken up."""
DWELL_KINDS = ("dwell",)
SATISFACTION_KINDS, TRUST_KINDS = ("survey_satisfied",), ("survey_trust",)
"""Survey answers, 1 to 5, about a list and no item. A deployment without a survey has metrics without data."""


@dataclass(frozen=True, slots=True)
class Metric:
    """Σ `numerator` / Σ `denominator` over people; `better` says which way is good.

    `margin` is how much worse, relative to control, an arm may be as long as this is only a guardrail: so much is
    given for what the experiment is to gain. `smallest_lift` is the least that is worth acting on: intervals are tuned
    for it, and an experiment that rules it out is over.
    """

    name: str
    numerator: str
    denominator: str
    better: Literal["higher", "lower"]
    margin: float
    words: str
    smallest_lift: float = 0.05

    @property
    def sign(self) -> int:
        """+1 if more is good, −1 if less is."""
        return 1 if self.better == "higher" else -1


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("click_rate", CLICKS, SHOWN, "higher", 0.03, "clicks per shown item"),
        Metric("clicked_request_rate", CLICKED_REQUESTS, REQUESTS, "higher", 0.03, "lists with a click"),
        Metric("clicks_per_person", CLICKS, PEOPLE, "higher", 0.05, "clicks per person"),
        Metric("requests_per_person", REQUESTS, PEOPLE, "higher", 0.05, "lists asked for per person"),
        Metric("like_rate", LIKES, SHOWN, "higher", 0.05, "likes per shown item"),
        Metric("purchase_rate", PURCHASES, SHOWN, "higher", 0.05, "purchases per shown item"),
        # Rare events: a narrower margin would never be proven.
        Metric("hide_rate", HIDES, SHOWN, "lower", 0.10, "hides per shown item", 0.15),
        Metric("degraded_rate", DEGRADED, REQUESTS, "lower", 0.10, "answers with a rung missing", 0.15),
        Metric("dwell_seconds_per_request", DWELL_SECONDS, REQUESTS, "higher", 0.05, "seconds spent per list"),
        Metric("satisfaction", SATISFACTION, SATISFACTION_ANSWERS, "higher", 0.05, "satisfaction in the survey"),
        Metric("trust", TRUST, TRUST_ANSWERS, "higher", 0.05, "trust in the survey"),
    )
}


def metric(name: str) -> Metric:
    """The metric called `name`. Raises DefinitionError if there is none."""
    found = METRICS.get(name)
    if found is None:
        near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise DefinitionError(
            f"there is no metric {name!r}{meant}; known: {', '.join(METRICS)}; name one of these in experiments.toml, or "
            "declare it in orchestration/compute/experiments/metrics.py"
        )
    return found


def metrics(names: Iterable[str]) -> tuple[Metric, ...]:
    """The metrics called so, each once. Raises DefinitionError for an unknown one."""
    return tuple(metric(name) for name in dict.fromkeys(names))
