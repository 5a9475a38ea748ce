"""What is remembered of each day: what was seen, and beside it what was true."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date


@dataclass(slots=True)
class Arm:
    """What an arm really got on a day, and what it would have got had everybody been in it."""

    lists: int = 0
    clicked: int = 0
    hidden: int = 0
    asked: int = 0
    """Lists of everybody in the experiment, whichever arm they were in; the next three are of what they would be in this arm:
    items, and the clicks and hides expected of them."""
    shown: int = 0
    clicks: float = 0.0
    hides: float = 0.0


@dataclass(slots=True)
class Estimate:
    """What the product's experiment report said at the end of a day; lifts are relative, None before the first look."""

    day: int
    people: int
    lift: float | None
    low: float | None
    high: float | None
    verdict: str
    words: str
    done: tuple[str, ...]


@dataclass(slots=True)
class Drift:
    """What the product's drift report said at the end of a day. `reach` is the largest distance of each kind that a new model may
    cure, in multiples of what an alarm needs; a kind of which nothing can be compared yet is not in it."""

    alarms: list[str]
    severe: list[str]
    reach: dict[str, float]


@dataclass(slots=True)
class Visit:
    """A list that somebody asked for: true probability of at least one click, and whether there was one."""

    day: int
    user_id: str
    pick: float
    picked: bool


@dataclass(slots=True)
class Day:
    """A day of the month."""

    number: int
    date: date
    visits: int = 0
    shown: int = 0
    clicked: int = 0
    hidden: int = 0
    clicks: float = 0.0
    """Expected: the sum of the true probabilities over what was shown."""
    relevance: float = 0.0
    """Mean true relevance of what was shown; then of the list of what is trending, and of the best possible one."""
    popular: float = 0.0
    best: float = 0.0
    popular_clicks: float = 0.0
    best_clicks: float = 0.0
    degraded: int = 0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    models: dict[str, int] = field(default_factory=dict)
    arms: dict[str, dict[str, Arm]] = field(default_factory=dict)
    drift: Drift | None = None
    happened: list[str] = field(default_factory=list)

    @property
    def click_rate(self) -> float:
        return self.clicked / max(self.shown, 1)

    @property
    def true_click_rate(self) -> float:
        return self.clicks / max(self.shown, 1)


@dataclass(slots=True)
class Learned:
    """A model: when it was trained, what its gate said, how long it took. `day` 0 is before the month."""

    day: int
    version: str
    passed: bool
    words: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Power:
    """What is expected of an experiment's guardrail `click_rate`: the true harm, who will come, how often it sees the harm by
    the last day. A floor: looks before the last, and the other guardrail, can only add to it."""

    trial: str
    harm: float
    people: int
    lists: int
    se: float
    power: float

    @property
    def words(self) -> str:
        return (
            f"experiment {self.trial}: in truth its arm loses {self.harm:.0%} of the clicks; {self.people:,} people with "
            f"{self.lists:,} lists let the guardrail see that with a probability of {self.power:.0%} at least"
        )


@dataclass(slots=True)
class Story:
    """The month."""

    days: list[Day] = field(default_factory=list)
    models: list[Learned] = field(default_factory=list)
    estimates: dict[str, list[Estimate]] = field(default_factory=dict)
    visits: list[Visit] = field(default_factory=list)
    power: dict[str, Power] = field(default_factory=dict)
    """By experiment: what its guardrail could be expected to see, said before the month."""

    def alarms_before(self, day: int) -> dict[str, int]:
        """What had an alarm before that day, and on which it was first. Something is a kind and a name, whatever the test."""
        found: dict[str, int] = {}
        for one in self.days:
            for alarm in one.drift.alarms if one.drift and one.number < day else ():
                found.setdefault(_thing(alarm), one.number)
        return found

    def alarm_since(self, day: int, *, severe: bool) -> tuple[int, list[str]] | None:
        """The first day from that one on with a (severe) alarm of something that had none before it, and of what.

        What had moved already says nothing of what began then.
        """
        known = self.alarms_before(day)
        for one in self.days:
            if one.drift is not None and one.number >= day:
                alarms = one.drift.severe if severe else one.drift.alarms
                if new := sorted({_thing(alarm) for alarm in alarms} - known.keys()):
                    return one.number, new
        return None

    def true_rates(self, trial: str, arm: str) -> tuple[float, float]:
        """Clicks and hides per shown item over the whole experiment, had everybody been in that arm."""
        found = [day.arms[trial][arm] for day in self.days if arm in day.arms.get(trial, {})]
        shown = max(sum(one.shown for one in found), 1)
        return sum(one.clicks for one in found) / shown, sum(one.hides for one in found) / shown


def _thing(alarm: str) -> str:
    return alarm.partition(" (")[0]
