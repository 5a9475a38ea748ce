"""Conditions on catalogue items that files and requests declare: checked, then compiled to parameterised SQL, or tried here.

Nothing that anybody wrote becomes SQL text: attribute names and values travel as parameters, and a statement's text depends
on the kinds of conditions alone. `matches` says of one item what the SQL says of its row; a test holds them to each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeGuard

MAX_VALUES = 100
MAX_NAME_BYTES = 128
MAX_TEXT_BYTES = 512
_NUMBER = r"^[+-]?[0-9]{1,15}([.][0-9]{1,15})?$"
"""What counts as a number, also where a source stored it as text; others have no order that one may compare by."""

Value = str | float


@dataclass(frozen=True, slots=True)
class Condition:
    """What one attribute, or the categories, of an item must be. Exactly one of `attribute` and `category` is set.

    `category`: the item has it. `attribute`: every one of the bounds given holds, or, without any, the item has it; numbers
    are compared as numbers and include their bounds, texts as they are. An item without the attribute, or with one that is no number where a number is
    compared, does not hold, unless `missing` is True.
    """

    attribute: str | None = None
    category: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    one_of: tuple[Value, ...] = ()
    none_of: tuple[Value, ...] = ()
    missing: bool = False

    def sql(self, item: str, name: str) -> tuple[str, dict[str, object]]:
        """The condition on row `item` of `items`, and its parameters, whose names begin with `name`."""
        if self.category is not None:
            return f"%({name}_category)s = ANY({item}.categories)", {f"{name}_category": self.category}
        value = f"({item}.attributes ->> %({name}_attribute)s::text)"
        # Postgres is free to compute a cast before the test beside it, but not before a CASE's own.
        number = f"(CASE WHEN {value} ~ '{_NUMBER}' THEN {value}::float8 END)"
        parameters: dict[str, object] = {f"{name}_attribute": self.attribute}
        parts = []
        for bound, operator in (("at_least", ">="), ("at_most", "<=")):
            if getattr(self, bound) is not None:
                parts.append(f"coalesce({number} {operator} %({name}_{bound})s::float8, false)")
                parameters[f"{name}_{bound}"] = float(getattr(self, bound))
        for bound, negate in (("one_of", ""), ("none_of", "NOT ")):
            values: tuple[Value, ...] = getattr(self, bound)
            if values:
                texts, numbers = f"{name}_{bound}_texts", f"{name}_{bound}_numbers"
                parts.append(
                    f"{negate}(coalesce({value} = ANY(%({texts})s::text[]), false) "
                    f"OR coalesce({number} = ANY(%({numbers})s::float8[]), false))"
                )
                parameters[texts] = [one for one in values if isinstance(one, str)]
                parameters[numbers] = [float(one) for one in values if not isinstance(one, str)]
        held = " AND ".join(parts) or "true"
        absent = "true" if self.missing else "false"
        return f"(CASE WHEN {value} IS NULL THEN {absent} ELSE {held} END)", parameters

    def matches(self, categories: Iterable[str], attributes: Mapping[str, object]) -> bool:
        """Whether an item of these categories and attributes holds."""
        if self.category is not None:
            return self.category in set(categories)
        text = _as_text(attributes.get(self.attribute or ""))
        if text is None:
            return self.missing
        number = float(text) if re.match(_NUMBER, text, re.ASCII) and not text.endswith("\n") else None
        if self.at_least is not None and (number is None or number < self.at_least):
            return False
        if self.at_most is not None and (number is None or number > self.at_most):
            return False

        def among(values: Sequence[Value]) -> bool:
            texts = [one for one in values if isinstance(one, str)]
            return text in texts or number in [float(one) for one in values if not isinstance(one, str)]

        return (not self.one_of or among(self.one_of)) and not (self.none_of and among(self.none_of))


def all_sql(conditions: Sequence[Condition], item: str, name: str) -> tuple[str, dict[str, object]]:
    """All of `conditions` as one; `true` without any."""
    parts: list[str] = []
    parameters: dict[str, object] = {}
    for number, condition in enumerate(conditions):
        sql, its = condition.sql(item, f"{name}_{number}")
        parts.append(sql)
        parameters |= its
    return " AND ".join(parts) or "true", parameters


def read_condition(raw: Mapping[str, Any], where: str, faults: list[str]) -> Condition | None:
    """The condition declared by `raw`, called `where` in messages; None if `faults` were added."""
    known = ("attribute", "category", "at_least", "at_most", "equals", "one_of", "none_of", "missing")
    before = len(faults)
    for name in raw:
        if name not in known:
            faults.append(f"{where} has no {name!r}; known: {', '.join(known)}")
    if ("attribute" in raw) == ("category" in raw):
        given = "both" if "attribute" in raw else "neither"
        faults.append(f"{where} gives {given} of attribute and category; give exactly one of them")
    for name in ("attribute", "category"):
        value = raw.get(name)
        if name in raw and not is_name(value):
            faults.append(f"{where}.{name} is {value!r}; give a text of 1 to {MAX_NAME_BYTES} bytes")
    bounds = [name for name in ("at_least", "at_most", "equals", "one_of", "none_of") if name in raw]
    if "category" in raw and (bounds or "missing" in raw):
        faults.append(
            f"{where} names a category, which an item has or has not; leave out {', '.join(bounds) or 'missing'}"
        )
    elif "attribute" in raw and not bounds:
        faults.append(f"{where} says nothing of its attribute; give at_least, at_most, equals, one_of or none_of")
    for name in ("at_least", "at_most"):
        if name in raw and not _is_number(raw[name]):
            faults.append(f"{where}.{name} is {raw[name]!r}; give a finite number")
    low, high = raw.get("at_least"), raw.get("at_most")
    if _is_number(low) and _is_number(high) and low > high:
        faults.append(f"{where} wants at least {low!r} and at most {high!r}: nothing is both")
    lists = {name: raw[name] for name in ("one_of", "none_of") if name in raw}
    if "equals" in raw:
        if "one_of" in raw:
            faults.append(f"{where} gives equals and one_of; give one of them")
        lists["one_of"] = [raw["equals"]]
    for name, values in lists.items():
        if not isinstance(values, list) or not 1 <= len(values) <= MAX_VALUES or not all(map(_is_value, values)):
            faults.append(f"{where}.{name} is {str(values)[:80]}; give 1 to {MAX_VALUES} texts or finite numbers")
    if not isinstance(raw.get("missing", False), bool):
        faults.append(f"{where}.missing is {raw['missing']!r}; give true (such items hold) or false (they do not)")
    if len(faults) > before:
        return None
    return Condition(
        raw.get("attribute"),
        raw.get("category"),
        low,
        high,
        tuple(lists.get("one_of", ())),
        tuple(lists.get("none_of", ())),
        raw.get("missing", False),
    )


def is_name(value: object) -> bool:
    """Whether `value` can be a category or the name of an attribute."""
    return isinstance(value, str) and 1 <= len(value.encode("utf-8", "replace")) <= MAX_NAME_BYTES and "\0" not in value


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e15


def _is_value(value: object) -> bool:
    text = isinstance(value, str) and len(value.encode("utf-8", "replace")) <= MAX_TEXT_BYTES and "\0" not in value
    return text or _is_number(value)


def _as_text(value: object) -> str | None:
    """`value` as Postgres's `->>` gives it: JSON's own words; None for null."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return format(Decimal(repr(value)), "f")
    return ""  # a list or an object is neither a number nor a text that somebody would name
