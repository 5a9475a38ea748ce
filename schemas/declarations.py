"""What a declaration must be, checked when it is made: every error names the view, the feature, the value, the way out.

Whether a condition (`where`) is SQL that fits the events can only an engine tell: orchestration/compute/bind.py asks
DuckDB when the definitions load, infra/feature_tables.py asks Postgres when it makes the tables.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from schemas.errors import DefinitionError

if TYPE_CHECKING:
    from schemas.features import Entity, Feature, FeatureView, State

MAX_WINDOW_DAYS = 3650
COLUMN_TYPES = {
    "event_id": "text",
    "user_id": "text",
    "item_id": "text",
    "category": "text",
    "kind": "text",
    "value": "a number",
    "occurred_at": "an instant",
    "known_at": "an instant",
}
"""The columns of an event, with those of its item that views are grouped by."""
STATE_COLUMNS = ("kind", "value", "occurred_at", "known_at")
"""The columns that the aggregates of every view see, besides its keys."""
_KEYS = ("user_id", "item_id", "category")
_STATES_OF_FINISH = {"state": (1, 2), "ratio": (2, 2), "age": (1, 1)}
_NAME = re.compile(r"^[a-z][a-z0-9_]{0,50}$")
_NAME_RULE = "a name is lower case letters, digits and _, begins with a letter and is at most 51 long"
_TEXT = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"")
_SUBQUERY = re.compile(r"\(\s*(select|with|values|table|from)\b|\bselect\b|--|/\*|;", re.IGNORECASE)
"""What a condition has no use for: queries, and what hides them."""
_OWNER = re.compile(r"^(team:.+|\S+@\S+\.\S+)$")


def check_views(views: Iterable[FeatureView]) -> None:
    """Raise DefinitionError unless the views can stand beside each other in one database."""
    named: dict[str, FeatureView] = {}
    entities: dict[str, tuple[Entity, str]] = {}
    for view in views:
        if view.name in named:
            raise DefinitionError(f"there are two views named {view.name!r}; rename one")
        named[view.name] = view
        entity, first = entities.setdefault(view.entity.name, (view.entity, view.name))
        if entity.keys != view.entity.keys:
            raise DefinitionError(
                f"view {view.name!r} is keyed by {', '.join(view.entity.keys)} and view {first!r} by "
                f"{', '.join(entity.keys)}, both under the entity name {entity.name!r}; rename one entity"
            )
    for entity, _ in entities.values():
        check_states(view for view in named.values() if view.entity == entity)


def check_states(views: Iterable[FeatureView]) -> None:
    """Raise DefinitionError if views of one entity, which share its tables, mean different things by one state's name."""
    held: dict[str, tuple[State, Feature, FeatureView]] = {}
    for view in views:
        for feature in view.features:
            for state in feature.states:
                other, by, of = held.setdefault(state.name, (state, feature, view))
                if other != state:
                    raise DefinitionError(
                        f"feature {feature.name!r} of view {view.name!r} defines state {state.name!r} as {meaning(state)}, "
                        f"feature {by.name!r} of view {of.name!r} as {meaning(other)}; "
                        f'give one of them a state of another name, such as state="{feature.name}"'
                    )


def check_view(view: FeatureView) -> None:
    """Raise DefinitionError unless `view` can be built, stored and read."""
    if not _NAME.match(view.name):
        raise DefinitionError(f"view {view.name!r}: {_NAME_RULE}; rename it")
    if not _OWNER.match(view.owner):
        raise DefinitionError(f"view {view.name!r} has the owner {view.owner!r}; say team:<name> or an e-mail address")
    _check_entity(view)
    if not view.features:
        raise DefinitionError(f"view {view.name!r} has no features; give it at least one")
    seen: set[str] = set()
    for feature in view.features:
        if feature.name in seen:
            raise DefinitionError(f"view {view.name!r} has two features named {feature.name!r}; rename one")
        seen.add(feature.name)
        _check_feature(view, feature)
    check_states([view])
    if not _whole(view.ttl_days) or view.ttl_days < 1:
        raise DefinitionError(
            f"view {view.name!r} has a ttl of {view.ttl_days!r} days, shorter than the head of its features "
            f"({', '.join(sorted(seen))}): a head is the day since the last snapshot; give a whole number, 1 or more"
        )
    names = [check.name for check in view.checks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DefinitionError(f"view {view.name!r} has two checks named {twice[0]!r}; keep one")


def _check_entity(view: FeatureView) -> None:
    entity = view.entity
    where = f"view {view.name!r}: entity {entity.name!r}"
    if not _NAME.match(entity.name):
        raise DefinitionError(f"{where}: {_NAME_RULE}; rename it")
    for key in entity.keys:
        if key not in COLUMN_TYPES:
            raise DefinitionError(f"{where} has the key column {key!r}, which events do not have{near(key, _KEYS)}")
        if COLUMN_TYPES[key] != "text":
            raise DefinitionError(
                f"{where} has the key column {key!r}, which is {COLUMN_TYPES[key]}; keys are text: {', '.join(_KEYS)}"
            )
        if key not in _KEYS:
            raise DefinitionError(f"{where} has the key column {key!r}; keys are some of {', '.join(_KEYS)}")
    if len(set(entity.keys)) < len(entity.keys):
        raise DefinitionError(f"{where} names a key column twice: {', '.join(entity.keys)}; keep one")
    if not {"user_id", "item_id"} & set(entity.keys):
        # An erasure finds what to count anew by the person or the items of the events that it took out.
        raise DefinitionError(
            f"{where} is keyed by {', '.join(entity.keys) or 'nothing'}; give it user_id or item_id, with or without category"
        )


def _check_feature(view: FeatureView, feature: Feature) -> None:
    where = f"feature {feature.name!r} of view {view.name!r}"
    if not _NAME.match(feature.name):
        raise DefinitionError(f"{where} cannot be a column: {_NAME_RULE}; rename it")
    if not _whole(feature.window_days) or not 1 <= feature.window_days <= MAX_WINDOW_DAYS:
        raise DefinitionError(
            f"{where} has a window of {feature.window_days} days; a window is a whole number of days, 1 to {MAX_WINDOW_DAYS}"
        )
    if feature.low is not None and feature.high is not None and feature.low > feature.high:
        raise DefinitionError(f"{where} lies between {feature.low} and {feature.high}; turn the limits round")
    least, most = _STATES_OF_FINISH.get(feature.finish, (0, 0))
    if not least <= len(feature.states) <= most:
        raise DefinitionError(
            f"{where} finishes {len(feature.states)} states by {feature.finish!r}; finishes are "
            f"{', '.join(sorted(_STATES_OF_FINISH))}, of which a ratio takes two states, an age one"
        )
    for state in feature.states:
        _check_state(view, feature, state)


def _check_state(view: FeatureView, feature: Feature, state: State) -> None:
    where = f"feature {feature.name!r} of view {view.name!r} has a state named {state.name!r}"
    if not _NAME.match(state.name):
        raise DefinitionError(f"{where}: {_NAME_RULE}; rename it")
    if state.name in (*view.entity.keys, "day", "partition_date"):
        raise DefinitionError(f"{where}, which is another column of its tables; rename it")
    if state.is_instant != (state.merge in ("min", "max") and state.aggregate.endswith("(occurred_at)")):
        raise DefinitionError(f"{where}; the names of instants, and of no other states, end in _at: rename it")
    if state.where is not None and _SUBQUERY.search(_TEXT.sub("''", state.where)):
        # Reads, tiles and training sets each run a condition over one event, in two databases with other tables.
        raise DefinitionError(
            f"feature {feature.name!r} of view {view.name!r} counts by {state.where!r}, which holds a query, a comment or more than one statement; "
            f"a condition sees one event: {', '.join((*view.entity.keys, *STATE_COLUMNS))}"
        )
    if state.by is not None and state.by not in feature.states:
        raise DefinitionError(f"{where}, which is ordered by {state.by.name!r}; give the feature both states")


def meaning(state: State) -> str:
    """What a state is, for messages."""
    return state.sql or f"a count that halves every {state.half_life_days:g} days"


def near(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown `name`: what it may have meant, or what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else f"; there are {', '.join(known)}"


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
