"""Parquet, CSV and JSONL files in a folder or under an S3 prefix, their columns named by a `larder.toml` beside them."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from orchestration.sources import BadRow
from orchestration.sources.movielens import KNOWN_LAYOUTS
from orchestration.sources.tabular_files import DELIMITERS, EPOCH, Store, TableFile, bad_row, open_store, store_name
from schemas.errors import SourceError
from schemas.events import Event, InvalidRow, Item, Person, check_event, check_id

EXAMPLE = """\
[events]
files = "events*.parquet"        # .parquet, .csv or .jsonl; * also crosses folders
time = "iso"                     # or "seconds", "milliseconds", "microseconds" since 1970; native timestamps always work
kind = "view"                    # where a row names none
delimiter = ","                  # between the fields of a CSV file, in any section; also ";", "|", "\\t"
columns = { user_id = "user", item_id = "item", occurred_at = "at" }   # also: event_id, kind, value, known_at

[items]
files = "items*.csv"
columns = { item_id = "id", title = "name" }    # also: description, categories, available_at
separator = "|"                  # between the categories within their field
attributes = []                  # further columns to keep

# [people]
# files = "people*.jsonl"
# columns = { user_id = "id" }
# profile = ["country"]
"""

Row = TypeVar("Row", Event, Item, Person)

UNITS: dict[str, int] = {"seconds": 1, "milliseconds": 1_000, "microseconds": 1_000_000}
EARLIEST, LATEST = datetime(1990, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
"""A number outside of these is a wrong unit: seconds read as milliseconds land in January 1970."""


@dataclass(frozen=True)
class _Shape:
    """What a section of larder.toml may hold; `extra` is its list of further columns."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    extra: str | None = None


SHAPES: dict[str, _Shape] = {
    "events": _Shape(
        ("user_id", "item_id", "occurred_at"), ("event_id", "kind", "value", "known_at"), ("time", "kind", "delimiter")
    ),
    "items": _Shape(
        ("item_id", "title"),
        ("description", "categories", "available_at"),
        ("time", "separator", "delimiter"),
        "attributes",
    ),
    "people": _Shape(("user_id",), (), ("delimiter",), "profile"),
}


@dataclass(frozen=True)
class _Section:
    """One table of the source: its files and how to read them."""

    name: str
    pattern: str
    columns: dict[str, str]
    extra: tuple[str, ...]
    options: dict[str, str]
    files: tuple[TableFile, ...]


class Tabular:
    """The source described by `larder.toml` in `location`, a folder or an `s3://bucket/prefix`.

    Everything that concerns the whole is checked here: raises SourceError for a missing or wrong larder.toml, files that
    are not there, columns that no file has. What concerns a row becomes a BadRow later.
    """

    historical = False

    def __init__(self, location: str | Path) -> None:
        self.name = store_name(location)
        self.description = f"Tables in {location}"
        self._store = open_store(location)
        config = self._store.read("larder.toml")
        if config is None:
            names = [file.name for file in self._store.files()]
            there = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise SourceError(
                f"{location}: unknown layout: found {there}, and larder.toml is missing. Known layouts, by their files:\n"
                f"{''.join(f'  {layout}{chr(10)}' for layout in KNOWN_LAYOUTS)}"
                f"For tables, put a larder.toml beside the files, for example:\n\n{EXAMPLE}"
            )
        self._config = config
        self._sections = _sections(self._store, config)

    def fingerprint(self) -> str:
        """Of larder.toml and of each file's name, size and version (S3: ETag; folder: time of change)."""
        files = [(f.name, f.size_bytes, f.version) for section in self._sections.values() for f in section.files]
        return hashlib.blake2b(repr((self._config, files)).encode(), digest_size=16).hexdigest()

    def time_range(self) -> tuple[datetime, datetime]:
        """Reads every event once."""
        low: datetime | None = None
        high: datetime | None = None
        for row in self.events():
            if isinstance(row, Event):
                low = min(low or row.occurred_at, row.occurred_at)
                high = max(high or row.occurred_at, row.occurred_at)
        if low is None or high is None:
            raise SourceError(f"{self._store.location}: {self._sections['events'].pattern} holds no usable event")
        return low, high

    def event_count(self) -> int | None:
        """Known without reading where all event files are Parquet."""
        counts = [file.row_count() for file in self._sections["events"].files]
        return sum(count for count in counts if count is not None) if None not in counts else None

    def items(self) -> Iterator[Item | BadRow]:
        yield from _rows(self._sections["items"], _item)

    def people(self) -> Iterator[Person | BadRow]:
        if "people" in self._sections:
            yield from _rows(self._sections["people"], _person)

    def events(self, since: date | None = None) -> Iterator[Event | BadRow]:
        first = datetime(since.year, since.month, since.day, tzinfo=UTC) if since else None
        for row in _rows(self._sections["events"], _event):
            if first is None or isinstance(row, BadRow) or row.occurred_at >= first:
                yield row


def _sections(store: Store, data: bytes) -> dict[str, _Section]:
    """Read larder.toml and check it against the files. Raises SourceError."""
    where = f"{store.location}: larder.toml"
    try:
        config = tomllib.loads(data.decode())
    except ValueError as error:
        raise SourceError(f"{where} is not TOML: {error}. An example:\n\n{EXAMPLE}") from None
    _known(where, "section", config, tuple(SHAPES))
    for name in ("events", "items"):
        if name not in config:
            raise SourceError(f"{where} has no [{name}]. An example:\n\n{EXAMPLE}")
    return {name: _section(store, f"{where} [{name}]", name, SHAPES[name], table) for name, table in config.items()}


def _section(store: Store, where: str, name: str, shape: _Shape, table: object) -> _Section:
    if not isinstance(table, dict):
        raise SourceError(f"{where} must be a table")
    _known(where, "key", table, ("files", "columns", *shape.options, *([shape.extra] if shape.extra else [])))
    columns = table.get("columns", {})
    extra = table.get(shape.extra, []) if shape.extra else []
    options = {key: table[key] for key in shape.options if key in table}
    texts = [table.get("files"), *options.values(), *(columns.values() if isinstance(columns, dict) else [None])]
    if not (all(isinstance(text, str) and text for text in texts) and isinstance(extra, list)):
        raise SourceError(f"{where}: files, columns and options are text; files is required. An example:\n\n{EXAMPLE}")
    _known(f"{where} columns", "field", columns, (*shape.required, *shape.optional))
    for field in shape.required:
        if field not in columns:
            raise SourceError(f"{where} columns: {field} is missing; say which column holds it")
    if options.get("time", "iso") not in ("iso", *UNITS):
        raise SourceError(f"{where}: time is {options['time']!r}; it must be one of iso, {', '.join(UNITS)}")
    delimiter = options.get("delimiter", ",")
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise SourceError(
            f"{where}: delimiter is {delimiter!r}; it must be one character, such as {_listed(DELIMITERS)}"
        )

    files = tuple(replace(file, delimiter=delimiter) for file in store.files(table["files"]))
    if not files:
        there = ", ".join(file.name for file in store.files()[:8]) or "nothing"
        raise SourceError(f"{where}: no file matches files = {table['files']!r}; found {there}")
    _check_columns(f"{where}: {store.location}", files, columns, shape.required, extra)
    return _Section(name, table["files"], columns, tuple(extra), options, files)


def _known(where: str, what: str, found: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in found:
        if name not in known:
            raise SourceError(f"{where}: unknown {what} {name!r}{_near(name, known)}; known: {', '.join(known)}")


def _near(name: str, known: tuple[str, ...]) -> str:
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def _check_columns(
    where: str, files: tuple[TableFile, ...], columns: dict[str, str], required: tuple[str, ...], extra: list[str]
) -> None:
    """Required columns must be in every file; the others in at least one, since newer files may have more."""
    missing = {column: "" for field, column in columns.items() if field not in required} | dict.fromkeys(extra, "")
    for file in files:
        there = file.columns()
        if there is None:
            continue
        for column in [columns[field] for field in required] + list(missing):
            if column in there:
                missing.pop(column, None)
                continue
            problem = f"{where}/{file.name} has no column {column!r}{_near(column, there)}; it has: {', '.join(there)}"
            problem += _delimiter_hint(there)
            if column in missing:
                missing[column] = problem
            else:
                raise SourceError(problem)
    for problem in missing.values():
        if problem:
            raise SourceError(problem)


def _delimiter_hint(header: tuple[str, ...]) -> str:
    """What to set if a header that is one column looks like several."""
    divider = max(DELIMITERS, key="".join(header).count)
    if len(header) != 1 or divider not in header[0]:
        return ""
    written = divider.replace("\t", "\\t")
    return f'; if its columns are divided by {divider!r}, set delimiter = "{written}" in this section (separator is for categories)'


def _listed(characters: str) -> str:
    return ", ".join(map(repr, characters))


def _rows(section: _Section, build: Callable[[_Section, dict[str, Any]], Row]) -> Iterator[Row | BadRow]:
    wanted = (*section.columns.values(), *section.extra)
    for file in section.files:
        for record in file.records(wanted):
            if isinstance(record, BadRow):
                yield record
                continue
            try:
                yield build(section, record.values)
            except InvalidRow as error:
                yield bad_row(file.name, record.line, str(error), record.raw)


def _event(section: _Section, values: dict[str, Any]) -> Event:
    field = _Fields(section, values)
    user_id, item_id = field.id("user_id"), field.id("item_id")
    kind = field.text("kind") or section.options.get("kind", "view")
    occurred_at = field.instant("occurred_at")
    if occurred_at is None:
        raise InvalidRow("occurred_at is empty")
    if "event_id" in section.columns:
        event_id = field.id("event_id")
    else:
        # The same person doing the same thing with the same item at the same instant is one event.
        facts = json.dumps([user_id, item_id, kind, occurred_at.isoformat()])
        event_id = hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()
    value, known_at = field.number("value"), field.instant("known_at")
    return check_event(Event(event_id, user_id, item_id, kind, value, occurred_at, known_at))


def _item(section: _Section, values: dict[str, Any]) -> Item:
    field = _Fields(section, values)
    title = field.text("title")
    if not title:
        raise InvalidRow("title is empty")
    return Item(
        item_id=field.id("item_id"),
        title=title,
        description=field.text("description"),
        categories=field.texts("categories"),
        attributes=field.extra(),
        available_at=field.instant("available_at"),
    )


def _person(section: _Section, values: dict[str, Any]) -> Person:
    field = _Fields(section, values)
    return Person(field.id("user_id"), field.extra())


class _Fields:
    """One row's mapped values, each read as what it has to be. Everything raises InvalidRow, naming the field."""

    def __init__(self, section: _Section, values: dict[str, Any]) -> None:
        self._section = section
        self._values = values

    def id(self, name: str) -> str:
        value = self._get(name)
        # Identifiers that once met a missing value come back from data frames as 42.0.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        return check_id(name, value)

    def text(self, name: str) -> str:
        value = self._get(name)
        return "" if value is None else _storable(name, value if isinstance(value, str) else str(value)).strip()

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._get(name)
        parts = value.split(self._section.options.get("separator", "|")) if isinstance(value, str) else value or []
        if not isinstance(parts, list):
            raise InvalidRow(f"{name} {value!r} is neither text nor a list")
        texts = (_storable(name, str(part)).strip() for part in parts if part is not None)
        return tuple(dict.fromkeys(text for text in texts if text))

    def number(self, name: str) -> float | None:
        value = self._get(name)
        if value is None:
            return None
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise InvalidRow(f"{name} {_short(value)} is not a number") from None

    def instant(self, name: str) -> datetime | None:
        """UTC; a time without zone is read as UTC."""
        value = self._get(name)
        if value is None:
            return None
        unit = self._section.options.get("time", "iso")
        try:
            return _instant(value, unit)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRow(f"{name} {_short(value)} is not a time ({unit}): {error}") from None

    def extra(self) -> dict[str, object]:
        """The further columns that have a value, as what JSON can hold."""
        return {
            name: value for name in self._section.extra if (value := _plain(name, self._values.get(name))) is not None
        }

    def _get(self, name: str) -> Any:
        value = self._values.get(self._section.columns.get(name, ""))
        missing = value == "" if isinstance(value, str) else isinstance(value, float) and math.isnan(value)
        return None if missing else value


def _instant(value: Any, unit: str) -> datetime:
    if isinstance(value, datetime):
        moment = value
    elif isinstance(value, date):
        moment = datetime(value.year, value.month, value.day)
    elif unit == "iso":
        if not isinstance(value, str):
            raise ValueError(f'for numbers set time = "seconds" (or {", ".join(list(UNITS)[1:])}) in larder.toml')
        moment = datetime.fromisoformat(value.strip())
    else:
        # Whole numbers stay whole: a float has too few digits for microseconds.
        number = float(value) if isinstance(value, float) or "." in str(value) else int(value)
        moment = EPOCH + timedelta(microseconds=number * (1_000_000 // UNITS[unit]))
        if not EARLIEST <= moment <= LATEST:
            raise ValueError(f"as {unit} it would be {moment:%Y-%m-%d}; set the right time unit in larder.toml")
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _plain(name: str, value: Any) -> object:
    """A value as JSON can hold it; None for what is missing."""
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(name, part) for part in value]
    if isinstance(value, dict):
        return {_storable(name, str(key)): _plain(name, part) for key, part in value.items()}
    return value.isoformat() if isinstance(value, date) else _storable(name, str(value))


def _storable(name: str, text: str) -> str:
    """Text that Postgres and Parquet can keep: no NUL, valid Unicode."""
    if "\x00" in text:
        raise InvalidRow(f"{name} holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRow(f"{name} is not valid UTF-8") from None
    return text


def _short(value: object) -> str:
    return repr(value)[:80]
