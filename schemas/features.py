"""What a feature is: entities, aggregations, windows, and the mergeable states that carry them.

A feature over a window of w days, read at time t, covers `[floor_day(t) - w days, t)`. Its value is never
stored as such: it is finished from *states* that merge, so that a daily snapshot (everything before a midnight)
and the head (everything since) give the same value as one pass over all events.

    view ──▶ features ──▶ states (n, value_sum, last_at …)      one column per state in a tile (entity, day)
                              └─ × window ─▶ snapshot columns   one column per state and window (n_7d, n_30d …)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from schemas.checks import VIEW_CHECKS, Check
from schemas.declarations import check_view
from schemas.errors import DefinitionError


class Merge(StrEnum):
    """How two states of one kind become one."""

    SUM = "sum"
    MIN = "min"
    MAX = "max"
    DAYS = "days"
    """A sum of ones, one for each day with an event: two parts of the same day are one day."""
    DECAY = "decay"
    """A sum whose parts lose half their weight every `half_life_days`."""
    LAST = "last"
    """The part with the later instant; of two with one instant, the larger."""


@dataclass(frozen=True, slots=True)
class State:
    """One mergeable column of a tile: an SQL aggregate over the events of one entity and day.

    `aggregate` and the condition `where` use the event columns `kind`, `value`, `occurred_at` and are valid in DuckDB
    and Postgres alike. A DECAY state has no SQL of its own: the engines weigh each event by its age. A LAST state is
    the second element of an aggregate whose first one orders it; `by` is the state that holds that instant.
    """

    name: str
    merge: Merge
    aggregate: str
    where: str | None = None
    half_life_days: float | None = None
    by: State | None = None

    @property
    def sql(self) -> str:
        """The state over all events of its entity and day."""
        return self.sql_over()

    def sql_over(self, *conditions: str) -> str:
        """The state over the events for which all `conditions` hold, besides its own."""
        own = [f"({self.where})" if conditions else self.where] if self.where else []
        filtered = " AND ".join([*conditions, *own])
        sql = f"{self.aggregate} FILTER (WHERE {filtered})" if filtered else self.aggregate
        return f"({sql})[2]" if self.merge is Merge.LAST else sql

    @property
    def is_count(self) -> bool:
        """True if the state is a whole number that is 0, not missing, where there is nothing to count."""
        return self.merge is Merge.DAYS or (self.merge is Merge.SUM and self.aggregate.startswith("COUNT"))

    @property
    def is_instant(self) -> bool:
        """True if the state is a moment, not a number."""
        return self.name.endswith(INSTANT_SUFFIX)


INSTANT_SUFFIX = "_at"
"""Ends the name of every state that holds an instant, and of no other."""


class Transform(StrEnum):
    """How a finished value enters the ranker, so that no input spans many orders of magnitude."""

    IDENTITY = "identity"
    LOG1P = "log1p"


@dataclass(frozen=True, slots=True)
class Feature:
    """One number per entity.

    `finish` says how the value comes out of the states, in this order:
    `state` (the state itself), `ratio` (first over second), `age` (seconds from the state to the read).
    `low` and `high` are what a value can be: outside of them something is broken, not rare.
    """

    name: str
    window_days: int
    states: tuple[State, ...]
    finish: str
    transform: Transform
    description: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Entity:
    """What a row is about: one or more key columns, all text."""

    name: str
    keys: tuple[str, ...]

    @property
    def by_category(self) -> bool:
        """True if an event counts once for each category of its item."""
        return "category" in self.keys


USER = Entity("user", ("user_id",))
ITEM = Entity("item", ("item_id",))
USER_CATEGORY = Entity("user_category", ("user_id", "category"))


@dataclass(frozen=True, slots=True)
class FeatureView:
    """Features of one entity, built together from events, partition by partition.

    `ttl_days`: a value older than this at the time of the read is EXPIRED. `owner` is who answers for it.
    A view whose keys hold `category` counts an event once for each category of its item.
    `checks` are what every partition must hold; they do not change what is stored.
    """

    name: str
    entity: Entity
    owner: str
    description: str
    ttl_days: int
    features: tuple[Feature, ...]
    checks: tuple[Check, ...] = VIEW_CHECKS

    def __post_init__(self) -> None:
        check_view(self)

    def __hash__(self) -> int:
        # Views are the keys of what callers ask for: hashing every feature of each would cost more than to read them.
        return hash(self.name)

    @property
    def states(self) -> tuple[State, ...]:
        """The distinct states of a tile, in order of first use."""
        return _states_of(self)

    @property
    def columns(self) -> tuple[tuple[str, State, int], ...]:
        """The snapshot's columns `(name, state, window_days)`: one per state and window, in order of first use."""
        return _columns_of(self)

    @property
    def max_window_days(self) -> int:
        """The longest window: an entity without an event in it has no row."""
        return max(feature.window_days for feature in self.features)

    @property
    def definition_hash(self) -> str:
        """Changes exactly when a stored value could: keys, states, windows, category grouping."""
        return _definition_hash_of(self)


# Every request asks for these of every view.
@cache
def _states_of(view: FeatureView) -> tuple[State, ...]:
    return tuple({state.name: state for feature in view.features for state in feature.states}.values())


@cache
def _columns_of(view: FeatureView) -> tuple[tuple[str, State, int], ...]:
    return tuple(
        {
            column(state, feature.window_days): (column(state, feature.window_days), state, feature.window_days)
            for feature in view.features
            for state in feature.states
        }.values()
    )


@cache
def _definition_hash_of(view: FeatureView) -> str:
    parts = [view.name, *view.entity.keys]
    parts += [f"{name}|{state.merge}|{state.sql}|{state.half_life_days}|{days}" for name, state, days in view.columns]
    return _digest(parts)


def column(state: State, window_days: int) -> str:
    """The snapshot column that holds `state` over a window."""
    return f"{state.name}_{window_days}d"


def feature_fingerprint(names: Iterable[str]) -> str:
    """Hash of an ordered list of feature names and their meaning: a model is only fed the order it learned."""
    return _digest(names)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


# --- the aggregations ---------------------------------------------------------------------------------------------


# Sums are exact decimals: a float sum depends on the order in which an engine meets the rows.
_SUM = "SUM(CAST(value AS DECIMAL(18, 6)))"
_N = State("n", Merge.SUM, "COUNT(*)")
_VALUE_SUM = State("value_sum", Merge.SUM, _SUM)
_VALUE_N = State("value_n", Merge.SUM, "COUNT(value)")
_VALUE_AT = State("value_at", Merge.MAX, "MAX(occurred_at)", "value IS NOT NULL")
# Arrays are compared from the left, so the largest one holds the value of the latest instant. Two values of one instant
# have no order that survives a merge, and no engine keeps that of their arrival: the larger one counts, everywhere.
# A double tells instants one microsecond apart until the year 2242.
_VALUE_LAST = State(
    "value_last",
    Merge.LAST,
    "MAX(ARRAY[EXTRACT(EPOCH FROM occurred_at), value])",
    "value IS NOT NULL",
    by=_VALUE_AT,
)


def counted(state: str, where: str) -> State:
    """The number of events for which `where` holds, as a part of a `ratio`; `state` names it in tables."""
    return State(state, Merge.SUM, "COUNT(*)", where)


def summed(state: str, where: str) -> State:
    """The sum of `value` over the events for which `where` holds, as a part of a `ratio`; `state` names it in tables."""
    return State(state, Merge.SUM, _SUM, where)


def count(name: str, window_days: int, *, where: str | None = None, state: str | None = None) -> Feature:
    """Events in the window, or those for which `where` holds.

    `state` names what is counted in tables; without it the name is `n`, or one that comes from `where`.
    """
    if state is None:
        state = "n" if where is None else _name_of(where)
    held = State(state, Merge.SUM, "COUNT(*)", where)
    return Feature(name, window_days, (held,), "state", Transform.LOG1P, "events in the window", low=0)


def _name_of(where: str) -> str:
    """A state's name that says what is counted, and is another one for every condition."""
    words = re.sub(r"[^a-z0-9]+", "_", where.lower()).strip("_")
    return f"n_{words[:30]}_{_digest([where])[:6]}"


def mean_value(name: str, window_days: int, *, low: float | None = None, high: float | None = None) -> Feature:
    """Mean of `value` over the events that have one; `low` and `high` if values have a scale."""
    states = (_VALUE_SUM, _VALUE_N)
    return Feature(name, window_days, states, "ratio", Transform.IDENTITY, "mean value in the window", low, high)


def sum_value(name: str, window_days: int) -> Feature:
    """Sum of `value` over the events that have one."""
    return Feature(name, window_days, (_VALUE_SUM,), "state", Transform.IDENTITY, "sum of values in the window")


def min_value(name: str, window_days: int) -> Feature:
    """Smallest `value` in the window."""
    state = State("value_min", Merge.MIN, "MIN(value)")
    return Feature(name, window_days, (state,), "state", Transform.IDENTITY, "smallest value in the window")


def max_value(name: str, window_days: int) -> Feature:
    """Largest `value` in the window."""
    state = State("value_max", Merge.MAX, "MAX(value)")
    return Feature(name, window_days, (state,), "state", Transform.IDENTITY, "largest value in the window")


def last_value(name: str, window_days: int, *, low: float | None = None, high: float | None = None) -> Feature:
    """`value` of the latest event that has one; of several at one instant, the largest."""
    states = (_VALUE_LAST, _VALUE_AT)
    return Feature(name, window_days, states, "state", Transform.IDENTITY, "latest value in the window", low, high)


def ratio(name: str, window_days: int, over: State, under: State, *, description: str = "") -> Feature:
    """One `counted` or `summed` state over another; missing where the second is 0."""
    text = description or f"{over.name} over {under.name} in the window"
    return Feature(name, window_days, (over, under), "ratio", Transform.IDENTITY, text)


def rate(name: str, window_days: int, *, where: str, state: str, of: str = "value") -> Feature:
    """Share (0–1) of the events with a `value` (or of all, `of="events"`) for which `where` holds."""
    if of not in ("value", "events"):
        raise DefinitionError(f"feature {name!r} is a rate of {of!r}; say of='value' or of='events'")
    states = (counted(state, where), _VALUE_N if of == "value" else _N)
    text = f"share of events where {where}"
    return Feature(name, window_days, states, "ratio", Transform.IDENTITY, text, low=0, high=1)


def active_days(name: str, window_days: int) -> Feature:
    """Calendar days (UTC) with at least one event."""
    state = State("days", Merge.DAYS, "COUNT(DISTINCT CAST(occurred_at AS DATE))")
    text = "days with an event in the window"
    return Feature(name, window_days, (state,), "state", Transform.LOG1P, text, low=0, high=window_days)


def last_seen(name: str, window_days: int) -> Feature:
    """Seconds from the last event to the read."""
    state = State("last_at", Merge.MAX, "MAX(occurred_at)")
    return Feature(name, window_days, (state,), "age", Transform.LOG1P, "seconds since the last event")


def decayed_count(name: str, window_days: int, *, half_life_days: float) -> Feature:
    """Events in the window, each worth half as much for every `half_life_days` of its age."""
    if half_life_days <= 0:
        raise DefinitionError(f"feature {name!r} has a half life of {half_life_days} days; it must be positive")
    held = f"decayed_{half_life_days:g}".replace(".", "_")
    state = State(held, Merge.DECAY, "", half_life_days=half_life_days)
    text = f"events in the window, half weight every {half_life_days:g} days"
    return Feature(name, window_days, (state,), "state", Transform.LOG1P, text, low=0)
