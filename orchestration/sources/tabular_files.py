"""Files of a folder or an S3 prefix as streams of records: Parquet, CSV and JSONL, never a whole file in memory."""

from __future__ import annotations

import csv
import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from inference import aws
from orchestration.sources import BadRow
from schemas.errors import SourceError

SUFFIXES = (".parquet", ".csv", ".jsonl")
MAX_ROW_CHARS = 500
MAX_LINE_BYTES = 1 << 20
"""A longer line is cut, and so becomes a bad row: a file without line ends must not fill the memory."""
MAX_RECORD_LINES = 1000
"""A CSV row that a quote carries over more lines is not one: its first line is bad, the others are read for themselves."""
DELIMITERS = ",;\t|"
"""What divides the fields of a CSV file, as far as a hint may guess."""
BATCH_ROWS = 8192
JSONL_SAMPLE_ROWS = 200
S3_READ_BYTES = 4 << 20
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Record:
    """One row: its 1-based line (Parquet: row number), its values by column, and the row as it was."""

    line: int
    values: dict[str, Any]
    raw: object


def bad_row(file: str, line: int, reason: str, raw: object) -> BadRow:
    """A BadRow whose text any store can keep: cut, without NUL and lone surrogates."""
    text = raw if isinstance(raw, str) else repr(raw)
    text = text[:MAX_ROW_CHARS].encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")
    return BadRow(file, line, reason.encode("utf-8", "backslashreplace").decode(), text[:MAX_ROW_CHARS])


@dataclass(frozen=True)
class TableFile:
    """One file: `name` relative to the source, `version` changes with its content, `open` gives a fresh stream.

    `delimiter` stands between the fields of a line, if it is CSV.
    """

    name: str
    size_bytes: int
    version: str
    open: Callable[[], BinaryIO]
    delimiter: str = ","

    def columns(self) -> tuple[str, ...] | None:
        """Its columns (JSONL: those of its first rows); None for a file without any row."""
        match self._suffix():
            case ".parquet":
                with self._parquet() as parquet:
                    return tuple(parquet.schema_arrow.names)
            case ".csv":
                with self.open() as stream:
                    return csv_header(self.name, text_lines(stream), self.delimiter)
            case _:
                names: dict[str, None] = {}
                for _, record in zip(range(JSONL_SAMPLE_ROWS), self.records(()), strict=False):
                    if isinstance(record, Record):
                        names.update(dict.fromkeys(record.values))
                return tuple(names) or None

    def row_count(self) -> int | None:
        """Rows in a Parquet file; None for text, which would have to be read."""
        if self._suffix() != ".parquet":
            return None
        with self._parquet() as parquet:
            return int(parquet.metadata.num_rows)

    def records(self, wanted: tuple[str, ...]) -> Iterator[Record | BadRow]:
        """Stream the rows; `wanted` spares Parquet the other columns. Raises SourceError for an unreadable file."""
        match self._suffix():
            case ".parquet":
                yield from self._parquet_records(wanted)
            case ".csv":
                with self.open() as stream:
                    yield from csv_records(self.name, text_lines(stream), self.delimiter)
            case _:
                with self.open() as stream:
                    yield from _json_records(self.name, text_lines(stream))

    def _suffix(self) -> str:
        suffix = PurePosixPath(self.name).suffix.lower()
        if suffix not in SUFFIXES:
            raise SourceError(
                f"{self.name}: {suffix or 'no suffix'} is not a known format; known: {', '.join(SUFFIXES)}"
            )
        return suffix

    @contextmanager
    def _parquet(self) -> Iterator[Any]:
        with self.open() as stream:
            try:
                yield pq.ParquetFile(stream)
            except (pa.ArrowException, OSError) as error:
                raise SourceError(f"{self.name} is not readable as Parquet: {error}") from error

    def _parquet_records(self, wanted: tuple[str, ...]) -> Iterator[Record | BadRow]:
        with self._parquet() as parquet:
            names = [name for name in parquet.schema_arrow.names if name in wanted]
            line = 0
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=names, use_threads=False):
                for row in zip(*map(_column_values, batch.columns), strict=True):
                    line += 1
                    values = dict(zip(batch.schema.names, row, strict=True))
                    yield Record(line, values, values)


def _column_values(column: Any) -> list[Any]:
    """Python values of an Arrow column; instants as UTC, text with its broken bytes kept visible."""
    if pa.types.is_timestamp(column.type):
        zone = "UTC" if column.type.tz else None
        micros = column.cast(pa.timestamp("us", tz=zone), safe=False).cast(pa.int64()).to_pylist()
        return [None if value is None else _instant(value) for value in micros]
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        raw = column.cast(pa.binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]


def _instant(microseconds: int) -> datetime | str:
    try:
        return EPOCH + timedelta(microseconds=microseconds)
    except OverflowError:
        return f"{microseconds} microseconds"


def text_lines(stream: BinaryIO) -> Iterator[str]:
    """Lines with their ends; each at most MAX_LINE_BYTES, bytes that are not UTF-8 as lone surrogates."""
    first = True
    while line := stream.readline(MAX_LINE_BYTES):
        end = line
        while not end.endswith(b"\n") and (end := stream.readline(MAX_LINE_BYTES)):
            pass
        text = line.decode("utf-8", "surrogateescape")
        yield text.removeprefix("\ufeff") if first else text
        first = False


def csv_header(file: str, lines: Iterable[str], delimiter: str = ",") -> tuple[str, ...] | None:
    """The first row of a CSV file; None where there is none. Raises SourceError if it is no CSV."""
    for _, _, row in _csv_rows(lines, delimiter):
        if isinstance(row, str):
            raise SourceError(f"{file}: its header is {row}")
        return tuple(row)
    return None


def csv_records(file: str, lines: Iterable[str], delimiter: str = ",") -> Iterator[Record | BadRow]:
    """Rows under a header; a record's line is the one it begins on."""
    header: list[str] | None = None
    for line, text, row in _csv_rows(lines, delimiter):
        if isinstance(row, str):
            yield bad_row(file, line, row, text)
        elif header is None:
            header = row
        elif len(row) != len(header):
            yield bad_row(file, line, f"has {len(row)} columns; the header has {len(header)}", text)
        else:
            yield Record(line, dict(zip(header, row, strict=True)), delimiter.join(row))


def _csv_rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, str, list[str] | str]]:
    """Each row with the number and the text of the line it begins on; in a row's place, why that line begins none.

    A quoted field may hold line ends, but a quote that is never closed must not swallow the rows after it: what spans
    lines counts only if it is flawless and as wide as the first row. Otherwise its first line alone is bad.
    """
    feed = _Feed(lines)
    reader = csv.reader(feed, delimiter=delimiter)
    width: int | None = None
    while True:
        feed.begin()
        try:
            row: list[str] | str = next(reader)
            if len(feed.taken) > 1 or feed.ended:
                row = _over_lines(feed, delimiter, width)
        except StopIteration:
            return
        except csv.Error as error:
            row = f"not CSV: {error}"
        if isinstance(row, str):
            feed.give_back()
        elif row and width is None:
            width = len(row)
        if row:
            yield feed.line, feed.taken[0], row


def _over_lines(feed: _Feed, delimiter: str, width: int | None) -> list[str] | str:
    """The row that `feed` has taken several lines for, or why it is none. Raises csv.Error."""
    if feed.ended:
        where = "before the file ends" if len(feed.taken) < MAX_RECORD_LINES else f"within {MAX_RECORD_LINES} lines"
        return f"not CSV: a quote opens here that is not closed {where}"
    try:
        row = next(csv.reader(feed.taken, delimiter=delimiter, strict=True))
    except csv.Error:
        return "not CSV: a quote opens here, and the next one, lines below, does not close it"
    if width is not None and len(row) != width:
        return (
            f"has {len(row)} columns with the {len(feed.taken) - 1} lines that its quote spans; the header has {width}"
        )
    return row


class _Feed:
    """Lines for a csv.reader, at most MAX_RECORD_LINES a row, which can be given back to be read again."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines, self._back = iter(lines), deque[str]()
        self.line = 1
        """1-based number of the first line taken."""
        self.taken: list[str] = []
        self.ended = False
        """True if the row asked for a line that it did not get."""
        self._chars = 0

    def begin(self) -> None:
        """Begin a row with the next line."""
        self.line += len(self.taken)
        self.taken.clear()
        self.ended, self._chars = False, 0

    def give_back(self) -> None:
        """Have all lines but the first read again."""
        self._back.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        try:
            if len(self.taken) >= MAX_RECORD_LINES or self._chars > MAX_LINE_BYTES:
                raise StopIteration
            line = self._back.popleft() if self._back else next(self._lines)
        except StopIteration:
            self.ended = True
            raise
        self.taken.append(line)
        self._chars += len(line)
        return line


def _json_records(file: str, lines: Iterable[str]) -> Iterator[Record | BadRow]:
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield bad_row(file, line, f"not JSON: {error}", text)
            continue
        if isinstance(value, dict):
            yield Record(line, value, text)
        else:
            yield bad_row(file, line, f"is a JSON {type(value).__name__}, not an object", text)


class Store(Protocol):
    """A folder or an S3 prefix."""

    location: str

    def files(self, pattern: str = "*") -> list[TableFile]:
        """Its files by name, whose names relative to it match; `*` also crosses folders."""

    def read(self, name: str) -> bytes | None:
        """A small file; None if it is not there."""


def is_s3(location: str | Path) -> bool:
    return str(location).startswith("s3://")


def open_store(location: str | Path) -> Store:
    """Raises SourceError if there is no such folder or prefix, or nothing in it."""
    store: Store = _S3(str(location)) if is_s3(location) else _Folder(Path(location))
    if not store.files():
        raise SourceError(f"{location} is empty; put the data there or set DATA to where it is")
    return store


def store_name(location: str | Path) -> str:
    """Short name of a location: its last part."""
    return PurePosixPath(str(location).removeprefix("s3://")).name if is_s3(location) else Path(location).resolve().name


class _Folder:
    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self._folder = folder
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            raise SourceError(f"{folder} {what}; set DATA to the folder with the data")

    def files(self, pattern: str = "*") -> list[TableFile]:
        found = []
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if path.is_file() and not path.name.startswith(".") and fnmatchcase(name, pattern):
                facts = path.stat()
                found.append(TableFile(name, facts.st_size, str(facts.st_mtime_ns), _opener(path)))
        return found

    def read(self, name: str) -> bytes | None:
        path = self._folder / name
        return path.read_bytes() if path.is_file() else None


def _opener(path: Path) -> Callable[[], BinaryIO]:
    return lambda: path.open("rb")


class _S3:
    def __init__(self, location: str) -> None:
        self.location = location
        self._bucket, _, prefix = location.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
        with _s3_errors(location):
            # The endpoint comes from AWS_ENDPOINT_URL, which boto3 reads itself.
            self._client = aws.session().client("s3")
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            objects = [entry for page in pages for entry in page.get("Contents", [])]
        self._files = [self._file(entry) for entry in objects if not entry["Key"].endswith("/")]

    def files(self, pattern: str = "*") -> list[TableFile]:
        return [file for file in self._files if fnmatchcase(file.name, pattern)]

    def read(self, name: str) -> bytes | None:
        for file in self.files():
            if file.name == name:
                with file.open() as stream:
                    return stream.read()
        return None

    def _file(self, entry: dict[str, Any]) -> TableFile:
        key, size_bytes, etag = entry["Key"], int(entry["Size"]), entry["ETag"]

        def opened() -> BinaryIO:
            raw = _S3Reader(self._client, self._bucket, key, size_bytes, etag)
            return io.BufferedReader(raw, S3_READ_BYTES)

        return TableFile(key.removeprefix(self._prefix), size_bytes, etag, opened)


class _S3Reader(io.RawIOBase):
    """An object as a seekable stream of ranged reads, so that Parquet's footer comes without its body."""

    def __init__(self, client: Any, bucket: str, key: str, size_bytes: int, etag: str) -> None:
        self._client, self._where = client, {"Bucket": bucket, "Key": key, "IfMatch": etag}
        self._name, self._size_bytes, self._position = f"s3://{bucket}/{key}", size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size_bytes)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size_bytes)
        if end <= self._position:
            return 0
        with _s3_errors(self._name):
            answer = self._client.get_object(**self._where, Range=f"bytes={self._position}-{end - 1}")
            data: bytes = answer["Body"].read()
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@contextmanager
def _s3_errors(location: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise SourceError(
            f"{location} cannot be read: {error}; check the bucket's name, the credentials and AWS_ENDPOINT_URL"
        ) from error
