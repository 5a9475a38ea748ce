"""The rules of a deployment: what may be shown, how much of what, and what not again. Declared in `rules.toml`, all checked.

    not_again_days = 7                       shown within these days without a reaction: held back

    [filters.recent]                         every shown item holds
    attribute = "year"
    at_least = 1990

    [quotas.horror]                          slots of one category
    category = "horror"
    at_most = 2                              hard
    at_least = 0                             best effort

    [exposure.independent]                   share of the slots asked for, of a group of items
    attribute = "publisher"
    one_of = ["us", "them"]
    cap = 0.3                                hard, rounded down
    floor = 0.1                              best effort, rounded up

Hard rules are never broken: if they leave fewer than k items, fewer are shown, and the answer names the rule. What is best
effort is met as long as the candidates hold such items; where they do not, the answer names the rule, too.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference import artifacts
from inference.predicates import Condition, read_condition
from inference.rerank import Chosen, Limits
from schemas.errors import ArtifactError, SettingsError, Unavailable
from schemas.serving import AttributeFilter, RuleNote

FILE = "rules.toml"
"""Its name in a deployment's folder."""
MAX_GROUPS = 60
"""Quotas and exposure groups together: one bit each in what the database says of a candidate."""
MAX_FILTERS = 50
MAX_DAYS = 365
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


@dataclass(frozen=True, slots=True)
class Group:
    """A group of items and how many slots of a slate it may and should have; `name` is the rule's, `quotas.…`."""

    name: str
    condition: Condition
    most: float | None = None
    least: float = 0
    share: bool = False
    """Whether `most` and `least` are shares of the slots asked for, else they are slots."""

    def slots_most(self, k: int) -> int:
        """How many of k slots the group may have."""
        if self.most is None:
            return k
        # What is 0.3 · 10 on paper is 2.9999… or 3.0000…4 in floating point.
        return min(k, math.floor(self.most * k + 1e-9) if self.share else int(self.most))

    def slots_least(self, k: int) -> int:
        """How many of k slots it should have."""
        wanted = math.ceil(self.least * k - 1e-9) if self.share else int(self.least)
        return min(wanted, self.slots_most(k))


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules; none by default."""

    filters: Mapping[str, Condition]
    groups: tuple[Group, ...] = ()
    not_again_days: int = 0

    def where(self, asked: Iterable[AttributeFilter] = ()) -> tuple[Condition, ...]:
        """The filters, and those that a request `asked` for: all of them must hold."""
        return (*self.filters.values(), *map(condition_of, asked))

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Those of the groups, whose order is that of the bits of `Filters.group_bits`."""
        return tuple(group.condition for group in self.groups)

    def limits(self, bits: NDArray[np.int64], k: int) -> Limits | None:
        """The groups' limits on a slate of k of the candidates with these group bits `(n,)`; None without groups."""
        if not self.groups:
            return None
        number = np.arange(len(self.groups))[:, None]
        return Limits(
            (bits[None, :] >> number) & 1 == 1,
            np.array([group.slots_most(k) for group in self.groups], np.int64),
            np.array([group.slots_least(k) for group in self.groups], np.int64),
        )

    def notes(self, chosen: Chosen, k: int, *, held_back: int | None) -> tuple[RuleNote, ...]:
        """What the answer says of the rules for a slate of `chosen` where k items were asked for.

        `held_back` is how many items were; None: that could not be read.
        """
        short = k - len(chosen.order)
        named: list[str] = []
        if short > 0:
            # Which items a filter keeps out nobody counts: all that are in force are named.
            named = [self.groups[number].name for number in chosen.blocking]
            named += [f"filters.{name}" for name in self.filters]
            named += [NOT_AGAIN] if held_back else []
        notes = [RuleNote(rule=name, outcome="fewer", slots=short) for name in named]
        notes += [
            RuleNote(rule=self.groups[number].name, outcome="missed", slots=slots)
            for number, slots in chosen.missed.items()
        ]
        if self.not_again_days and held_back is None:
            notes.append(RuleNote(rule=NOT_AGAIN, outcome="unchecked", slots=0))
        return tuple(notes)


def condition_of(asked: AttributeFilter) -> Condition:
    """A request's filter as a condition."""
    return Condition(asked.attribute, None, asked.at_least, asked.at_most, asked.one_of, asked.none_of)


def bits_of(
    conditions: Sequence[Condition], items: Iterable[tuple[Collection[str], Mapping[str, object]]]
) -> NDArray[np.int64]:
    """Group bits `(n,)` of items of which categories and attributes are at hand, as the database would give them."""
    return np.array(
        [
            sum(1 << number for number, one in enumerate(conditions) if one.matches(categories, attributes))
            for categories, attributes in items
        ],
        np.int64,
    )


NO_RULES = Rules({})
NOT_AGAIN = "not_again_days"


def read_rules(place: str) -> Rules:
    """The rules at `place`, a path or an `s3://bucket/key`; none without one.

    Raises SettingsError that lists every fault and its way out.
    """
    return parse_rules(read_text(place), place) if place else NO_RULES


def read_text(place: str) -> str:
    """The text of the rules at `place`. Raises SettingsError if it cannot be read."""
    try:
        if place.startswith("s3://"):
            root, _, name = place.rpartition("/")
            return artifacts.get(root, name).decode()
        return Path(place).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ArtifactError, Unavailable) as error:
        raise SettingsError(
            f"the rules in {place} cannot be read ({error}); mend the file or unset LARDER_RULES"
        ) from error


def parse_rules(text: str, name: str = FILE) -> Rules:
    """The rules in `text`, the content of the file called `name`. Raises as `read_rules`."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{name} is not TOML: {error}") from error
    faults: list[str] = []
    known = ("not_again_days", "filters", "quotas", "exposure")
    faults += [f"there is no rule {key!r}; known: {', '.join(known)}" for key in raw if key not in known]
    days = raw.get("not_again_days", 0)
    if isinstance(days, bool) or not isinstance(days, int) or not 0 <= days <= MAX_DAYS:
        faults.append(f"not_again_days is {days!r}; give a whole number from 0 (off) to {MAX_DAYS}")
    filters = {
        key: condition
        for key, entry in _tables(raw, "filters", faults)
        if (condition := read_condition(entry, f"filters.{key}", faults)) is not None
    }
    groups = [_quota(key, entry, faults) for key, entry in _tables(raw, "quotas", faults)]
    groups += [_exposure(key, entry, faults) for key, entry in _tables(raw, "exposure", faults)]
    if len(groups) > MAX_GROUPS:
        faults.append(f"{len(groups)} quotas and exposure groups are declared; at most {MAX_GROUPS} are allowed")
    if len(filters) > MAX_FILTERS:
        faults.append(f"{len(filters)} filters are declared; at most {MAX_FILTERS} are allowed")
    if faults:
        raise SettingsError(f"the rules in {name} cannot be used: " + "; ".join(faults))
    return Rules(filters, tuple(group for group in groups if group is not None), days)


def _tables(raw: Mapping[str, Any], kind: str, faults: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """The tables `[<kind>.<name>]`."""
    found = raw.get(kind, {})
    if not isinstance(found, dict):
        faults.append(f"{kind} is {str(found)[:80]}; write a table per rule, [{kind}.a-name]")
        return []
    tables = []
    for key, entry in found.items():
        if not isinstance(entry, dict):
            faults.append(f"{kind}.{key} is {str(entry)[:80]}; write it as a table, [{kind}.a-name]")
        elif not _NAME.match(key):
            faults.append(f"{kind}.{key[:64]!r} is no name; give 1 to 64 letters, digits, - and _")
        else:
            tables.append((key, entry))
    return tables


def _quota(key: str, entry: Mapping[str, Any], faults: list[str]) -> Group | None:
    where = f"quotas.{key}"
    before = len(faults)
    rest = {name: value for name, value in entry.items() if name not in ("at_least", "at_most")}
    if "attribute" in rest:
        faults.append(f"{where} counts a category; an attribute's group is an [exposure.{key}] with cap and floor")
    condition = None if "attribute" in rest else read_condition(rest, where, faults)
    bounds = {name: entry[name] for name in ("at_least", "at_most") if name in entry}
    if not bounds:
        faults.append(f"{where} bounds nothing; give at_least, at_most or both")
    for name, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 500:
            faults.append(f"{where}.{name} is {value!r}; give a whole number of slots from 0 to 500")
    if len(faults) == before and bounds.get("at_least", 0) > bounds.get("at_most", 500):
        faults.append(f"{where} wants at least {bounds['at_least']} and at most {bounds['at_most']} slots")
    if len(faults) > before or condition is None:
        return None
    return Group(where, condition, bounds.get("at_most"), bounds.get("at_least", 0))


def _exposure(key: str, entry: Mapping[str, Any], faults: list[str]) -> Group | None:
    where = f"exposure.{key}"
    before = len(faults)
    rest = {name: value for name, value in entry.items() if name not in ("cap", "floor")}
    condition = read_condition(rest, where, faults)
    bounds = {name: entry[name] for name in ("cap", "floor") if name in entry}
    if not bounds:
        faults.append(f"{where} bounds nothing; give cap, floor or both")
    for name, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            faults.append(f"{where}.{name} is {value!r}; give a share of the slots from 0 to 1")
    if len(faults) == before and bounds.get("floor", 0) > bounds.get("cap", 1):
        faults.append(f"{where} has a floor of {bounds['floor']} above its cap of {bounds['cap']}")
    if len(faults) > before or condition is None:
        return None
    return Group(where, condition, bounds.get("cap"), bounds.get("floor", 0), share=True)
