"""MovieLens (Harper and Konstan, 2015) in its two public layouts: 100K, and the current one of CSV files."""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, ClassVar

from orchestration.sources import BadRow, Source
from orchestration.sources.tabular_files import bad_row, csv_header, csv_records, text_lines
from schemas.errors import SourceError
from schemas.events import Event, InvalidRow, Item, Person, check_event, check_id

KNOWN_LAYOUTS = (
    "MovieLens-100K: u.data, u.item, u.user in a folder",
    "current MovieLens: ratings.csv, movies.csv (tags.csv) in a folder",
    "tables: larder.toml beside .parquet, .csv or .jsonl files, in a folder or under an s3:// prefix",
)
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""In the order of u.item's flags."""

CAST_IN_DESCRIPTION = 4
TAGS_IN_DESCRIPTION = 8
NO_PLOT = "It looks like we don't have any Plot Summaries"
YEARS_APART_MAX = 2
HEADERLESS_SAMPLE_LINES = 20

_ARTICLES = "The|A|An|Le|La|Les|L'|Un|Une|Il|Lo|I|Gli|El|Los|Las|Der|Die|Das|Det|Den|De|O|Os"
_INVERTED = re.compile(rf"([^()]+), ({_ARTICLES})(?=\s*(?:[()]|$))")
_YEAR = re.compile(r"\((\d{4})[^()]*\)\s*(?:\([A-Z]+\)\s*)?$")


def open_movielens(folder: Path) -> Source | None:
    """The source for the layout found in `folder`, None if it is not MovieLens.

    Raises SourceError if the layout is known but a file or column is missing, and for the benchmark's sequences.txt.
    """
    if (folder / "u.data").exists() or (folder / "u.item").exists():
        return MovieLens100K(folder)
    if (folder / "ratings.csv").exists() or (folder / "movies.csv").exists():
        return MovieLensCsv(folder)
    if (folder / "sequences.txt").exists():
        raise SourceError(
            f"{folder}: sequences.txt gives the order of events but no timestamps, so no feature can be computed as of a "
            f"moment: it suits offline comparisons only. For DATA use one of: {'; '.join(KNOWN_LAYOUTS)}"
        )
    return None


def plain_title(title: str) -> str:
    """`Matrix, The (1999)` → `The Matrix (1999)`, also within brackets."""

    def turn(match: re.Match[str]) -> str:
        name, article = match.groups()
        lead = name[: len(name) - len(name.lstrip())]
        return f"{lead}{article}{'' if article.endswith(chr(39)) else ' '}{name.lstrip()}"

    return _INVERTED.sub(turn, title.strip())


def _title_year(title: str) -> int | None:
    match = _YEAR.search(title)
    return int(match.group(1)) if match else None


class _MovieLens:
    """What both layouts share: a finished set of ratings in `ratings`, one file."""

    historical = True
    name: str
    description: str
    ratings: str
    required: tuple[str, ...]
    optional: tuple[str, ...]

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:12])
        for name in self.required:
            if not (folder / name).is_file():
                raise SourceError(f"{folder}: {name} is missing; found {found}; expected {', '.join(self.required)}")
        self._range: tuple[datetime, datetime] | None = None

    def fingerprint(self) -> str:
        """Of each file's name, size and time of change."""
        files = [self._folder / name for name in (*self.required, *self.optional)]
        facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
        return hashlib.blake2b(repr((self.name, facts)).encode(), digest_size=16).hexdigest()

    def time_range(self) -> tuple[datetime, datetime]:
        if self._range is None:
            low = high = None
            for row in self._events():
                if isinstance(row, Event):
                    low = min(low or row.occurred_at, row.occurred_at)
                    high = max(high or row.occurred_at, row.occurred_at)
            if low is None or high is None:
                raise SourceError(f"{self._folder / self.ratings} holds no usable rating")
            self._range = low, high
        return self._range

    def events(self, since: date | None = None) -> Iterator[Event | BadRow]:
        first = datetime(since.year, since.month, since.day, tzinfo=UTC) if since else None
        for row in self._events():
            if first is None or isinstance(row, BadRow) or row.occurred_at >= first:
                yield row

    @abstractmethod
    def _events(self) -> Iterator[Event | BadRow]: ...

    def _count_lines(self) -> int:
        with (self._folder / self.ratings).open("rb") as lines:
            return sum(1 for line in lines if line.strip())


class MovieLens100K(_MovieLens):
    """u.data, u.item, u.user and, where it is there, movie_details.json with plots, directors and casts."""

    name = "movielens-100k"
    ratings = "u.data"
    required = ("u.data", "u.item", "u.user")
    optional = ("movie_details.json",)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.description = f"MovieLens-100K in {folder}"
        for name, columns, separator in (("u.data", 4, "\t"), ("u.item", 5 + len(GENRES), "|"), ("u.user", 5, "|")):
            _check_headerless(folder / name, columns, separator)

    def event_count(self) -> int | None:
        return self._count_lines()

    def _events(self) -> Iterator[Event | BadRow]:
        for row in _split_lines(self._folder / "u.data", "\t", 4):
            if isinstance(row, BadRow):
                yield row
            else:
                line, fields = row
                yield _rating("u.data", line, fields, "\t".join(fields))

    def items(self) -> Iterator[Item | BadRow]:
        details = self._details()
        for row in _split_lines(self._folder / "u.item", "|", 5 + len(GENRES)):
            if isinstance(row, BadRow):
                yield row
                continue
            line, fields = row
            flags = fields[5:]
            try:
                if set(flags) - {"0", "1"}:
                    raise InvalidRow("a genre flag is neither 0 nor 1")
                genres = tuple(
                    name for name, flag in zip(GENRES, flags, strict=True) if flag == "1" and name != "unknown"
                )
                yield _film(check_id("item_id", fields[0]), fields[1], genres, details.get(fields[0], {}))
            except InvalidRow as error:
                yield bad_row("u.item", line, str(error), "|".join(fields))

    def people(self) -> Iterator[Person | BadRow]:
        for row in _split_lines(self._folder / "u.user", "|", 5):
            if isinstance(row, BadRow):
                yield row
                continue
            line, (user_id, age, gender, occupation, zip_code) = row
            try:
                # The zip code stays out: with age and occupation it names a person, and no feature needs it.
                yield Person(
                    check_id("user_id", user_id),
                    {"age": _whole("age", age), "gender": gender, "occupation": occupation},
                )
            except InvalidRow as error:
                raw = "|".join((user_id, age, gender, occupation, zip_code))
                yield bad_row("u.user", line, str(error), raw)

    def _details(self) -> dict[str, dict[str, Any]]:
        """movie_details.json by movie_id as in u.item; empty if there is none."""
        path = self._folder / "movie_details.json"
        if not path.is_file():
            return {}
        try:
            rows = json.loads(path.read_bytes())
            return {str(row["movie_id"]): row for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise SourceError(
                f"{path} is not a list of objects with a movie_id ({type(error).__name__}: {error}); correct or remove it"
            ) from None


class MovieLensCsv(_MovieLens):
    """ratings.csv, movies.csv and, where it is there, tags.csv; the layout of every set since 2014."""

    ratings = "ratings.csv"
    required = ("ratings.csv", "movies.csv")
    optional = ("tags.csv",)
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "ratings.csv": ("userId", "movieId", "rating", "timestamp"),
        "movies.csv": ("movieId", "title", "genres"),
        "tags.csv": ("userId", "movieId", "tag", "timestamp"),
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.name = folder.resolve().name
        self.description = f"MovieLens in {folder}"
        for name in (*self.required, *self.optional):
            if (folder / name).is_file():
                with (folder / name).open("rb") as stream:
                    found = csv_header(name, text_lines(stream)) or ()
                missing = [column for column in self.columns[name] if column not in found]
                if missing:
                    raise SourceError(
                        f"{folder / name}: column {', '.join(missing)} is missing; "
                        f"found {', '.join(found) or 'nothing'}; expected {', '.join(self.columns[name])}"
                    )

    def event_count(self) -> int | None:
        return self._count_lines() - 1

    def people(self) -> Iterator[Person | BadRow]:
        """This layout says nothing about people."""
        return iter(())

    def _events(self) -> Iterator[Event | BadRow]:
        for row in self._rows("ratings.csv"):
            if isinstance(row, BadRow):
                yield row
            else:
                line, fields, raw = row
                yield _rating("ratings.csv", line, fields, raw)

    def items(self) -> Iterator[Item | BadRow]:
        tags = self._tags()
        for row in self._rows("movies.csv"):
            if isinstance(row, BadRow):
                yield row
                continue
            line, (item_id, title, genres), raw = row
            names = () if genres == "(no genres listed)" else tuple(filter(None, genres.split("|")))
            common = [tag for tag, _ in tags.get(item_id, Counter()).most_common(TAGS_IN_DESCRIPTION)]
            try:
                details = {"description": f"Tagged {', '.join(common)}."} if common else {}
                yield _film(check_id("item_id", item_id), title, names, details)
            except InvalidRow as error:
                yield bad_row("movies.csv", line, str(error), raw)

    def _tags(self) -> dict[str, Counter[str]]:
        """How often each item got each tag, in lower case; a broken tag is left out, it is decoration."""
        tags: dict[str, Counter[str]] = {}
        if (self._folder / "tags.csv").is_file():
            for row in self._rows("tags.csv"):
                if not isinstance(row, BadRow):
                    _, (_, item_id, tag, _), _ = row
                    tags.setdefault(item_id, Counter())[tag.strip().lower()] += 1
        return tags

    def _rows(self, name: str) -> Iterator[tuple[int, list[str], object] | BadRow]:
        """(line, the known columns' values, row) of one file."""
        with (self._folder / name).open("rb") as stream:
            for record in csv_records(name, text_lines(stream)):
                if isinstance(record, BadRow):
                    yield record
                else:
                    yield record.line, [record.values[column] for column in self.columns[name]], record.raw


def _check_headerless(path: Path, columns: int, separator: str) -> None:
    """Raise SourceError unless one of the first lines has that many columns: a single broken line is only a bad row."""
    with path.open(encoding="latin-1") as lines:
        sample = [line.rstrip("\n") for line, _ in zip(lines, range(HEADERLESS_SAMPLE_LINES), strict=False)]
    if not any(line.count(separator) + 1 == columns for line in sample):
        found = f"{sample[0].count(separator) + 1} in {sample[0][:80]!r}" if sample else "an empty file"
        raise SourceError(f"{path}: expected {columns} columns separated by {separator!r} and no header; found {found}")


def _split_lines(path: Path, separator: str, columns: int) -> Iterator[tuple[int, list[str]] | BadRow]:
    """(line, fields) of each line that is not blank."""
    # Only a line feed ends a line here: Latin-1 titles may hold what Unicode takes for one.
    with path.open(encoding="latin-1", newline="\n") as lines:
        for number, text in enumerate(lines, start=1):
            text = text.rstrip("\r\n")
            fields = text.split(separator)
            if len(fields) == columns:
                yield number, fields
            elif text.strip():
                yield bad_row(path.name, number, f"has {len(fields)} columns; expected {columns}", text)


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII):
        raise InvalidRow(f"{name} {text[:40]!r} is not a whole number")
    return int(text)


def _rating(file: str, line: int, fields: list[str], raw: object) -> Event | BadRow:
    """One rating from (user, item, rating, unix seconds)."""
    user_id, item_id, rating, seconds = fields
    try:
        if not re.fullmatch(r"\d(\.\d+)?", rating, re.ASCII) or not 0.5 <= float(rating) <= 5:
            raise InvalidRow(f"rating {rating[:40]!r} is not a number from 0.5 to 5")
        occurred_at = datetime.fromtimestamp(_whole("timestamp", seconds), UTC)
        event_id = f"ml-{user_id}-{item_id}-{seconds}"
        return check_event(Event(event_id, user_id, item_id, "rating", float(rating), occurred_at))
    except (InvalidRow, ValueError, OverflowError, OSError) as error:
        return bad_row(file, line, str(error), raw)


def _film(item_id: str, title: str, genres: tuple[str, ...], details: dict[str, Any]) -> Item:
    """An item; `details` may hold description, director, cast and year. Raises InvalidRow for text no store can keep."""
    known = title.strip() not in ("", "unknown")
    shown = plain_title(title) if known else f"Untitled film {item_id}"
    year = _title_year(title)
    stated = re.match(r"\d{4}", str(details.get("year") or ""))
    # Details were found by title: those of no title, or of a remake, are another film's.
    if not known or (stated and year and abs(int(stated.group()) - year) > YEARS_APART_MAX):
        details = {}
    elif stated and not year:
        year = int(stated.group())
    plot = " ".join(str(details.get("description") or "").split())
    sentences = ["" if plot.startswith(NO_PLOT) else plot]
    directors, cast = _names(details.get("director")), _names(details.get("cast"))[:CAST_IN_DESCRIPTION]
    if directors:
        sentences.append(f"Directed by {_listed(directors)}.")
    if cast:
        sentences.append(f"With {_listed(cast)}.")
    description = " ".join(filter(None, sentences))
    for text in (shown, description, *genres):
        if "\x00" in text or any("\ud800" <= char <= "\udfff" for char in text):
            raise InvalidRow("the text is not valid UTF-8 or holds a NUL character")
    facts = {"year": year, "directors": directors, "cast": cast}
    return Item(item_id, shown, description, genres, {name: fact for name, fact in facts.items() if fact})


def _names(value: object) -> list[str]:
    return [name.strip() for name in value if isinstance(name, str) and name.strip()] if isinstance(value, list) else []


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
