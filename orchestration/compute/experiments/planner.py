"""Before an experiment: how many people and days it needs for a lift, and what it would find with those it has."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.special import ndtr

from orchestration.compute.experiments.ratios import FIRST_LOOK_PEOPLE
from orchestration.compute.experiments.sequential import ALPHA, POWER, half_width, tune
from schemas.errors import DefinitionError

MOST_PEOPLE = 1e12


@dataclass(frozen=True, slots=True)
class Plan:
    """What an experiment of two arms needs. `power` is a floor: looks before the last can only add to it."""

    lift: float
    people: int
    """In both arms together."""
    power: float
    alpha: float
    days: int | None
    """With so many new people a day as were given; None: not asked."""

    def words(self) -> str:
        """The plan as a sentence."""
        days = "" if self.days is None else f", {self.days:,} days at the present rate"
        return (
            f"a lift of {self.lift:.1%} is found with a power of {self.power:.0%} or more by {self.people:,} people "
            f"in both arms{days}, looking as often as one likes"
        )


def power_with(
    lift: float,
    variance: float,
    people: float,
    *,
    share: float = 0.5,
    alpha: float = ALPHA,
    smallest: float | None = None,
) -> float:
    """The power to find `lift` among `people`, `share` of whom are treated, with the last look if not before.

    `variance` is `ratios.person_variance` of either arm; `smallest` the lift that the interval is tuned for (default:
    `lift`).
    """
    se = math.sqrt(variance / people * (1 / share + 1 / (1 - share)))
    width = float(half_width(se, tune(smallest or abs(lift), alpha), alpha))
    return float(ndtr((abs(lift) - width) / se))


def plan(
    lift: float,
    variance: float,
    *,
    share: float = 0.5,
    alpha: float = ALPHA,
    power: float = POWER,
    people_per_day: float | None = None,
) -> Plan:
    """The people that find `lift` with `power`.

    Raises DefinitionError for a lift of zero, a power or share outside 0–1, or a variance that is not above zero.
    """
    for name, value, good in (
        ("lift", lift, lift != 0 and math.isfinite(lift)),
        ("variance", variance, variance > 0 and math.isfinite(variance)),
        ("share", share, 0 < share < 1),
        ("power", power, 0 < power < 1),
        ("alpha", alpha, 0 < alpha < 1),
        ("people_per_day", people_per_day, people_per_day is None or people_per_day > 0),
    ):
        if not good:
            raise DefinitionError(f"{name} is {value}, which no experiment can be planned with; see `planner.plan`")

    def missing(log_people: float) -> float:
        return power_with(lift, variance, math.exp(log_people), share=share, alpha=alpha) - power

    if missing(math.log(MOST_PEOPLE)) < 0:
        raise DefinitionError(
            f"a lift of {lift:.4%} with a variance of {variance:.3g} needs more than {MOST_PEOPLE:.0e} people; look for a "
            "larger one, or for a metric that varies less"
        )
    least = math.log(2 * FIRST_LOOK_PEOPLE)
    enough = least if missing(least) >= 0 else brentq(missing, least, math.log(MOST_PEOPLE), xtol=1e-9)
    people = math.ceil(math.exp(enough))
    days = None if people_per_day is None else math.ceil(people / people_per_day)
    return Plan(lift, people, power_with(lift, variance, people, share=share, alpha=alpha), alpha, days)
