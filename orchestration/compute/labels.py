"""Label tables as they come: Parquet, CSV, JSONL or Arrow, in batches whose keys are text and whose instants are UTC."""

from __future__ import annotations

import difflib
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestration.compute.duck import duck
from schemas.errors import RequestError
from schemas.features import FeatureView
from schemas.views import VIEWS

BATCH_ROWS = 100_000
KEY_COLUMNS = tuple(dict.fromkeys(key for view in VIEWS for key in view.entity.keys))
TIME_NAMES = ("at", "label_at", "occurred_at", "event_timestamp", "timestamp", "time", "ts")
"""What a time column is usually called: looked for where no type tells."""
INSTANT = pa.timestamp("us", tz="UTC")
_FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_ZONE = r"(?i)\d:\d\d.*(z|utc|[+-]\d\d(:?\d\d)?|[a-z_]+/[a-z_/]+)\s*$"
_TYPO = 0.8
"""How like a key column's name another name must be to count as a misspelling of it (difflib's ratio)."""


@dataclass(slots=True)
class Labels:
    """A label table that is read once, from the first row to the last.

    `schema` is how its batches come: key columns as text, the column `time` in UTC, all others as they are. `digest` is
    the SHA-256 of the file's bytes (an Arrow table: of its rows). `naive_times` counts, as batches are read, the times
    that came without a zone and were taken as UTC.
    """

    name: str
    schema: pa.Schema
    time: str
    digest: str
    rows: int | None
    _read: Callable[[], Iterator[pa.RecordBatch]]
    naive_times: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """The key columns that the table has."""
        return tuple(name for name in KEY_COLUMNS if name in self.schema.names)

    def batches(self) -> Iterator[pa.Table]:
        """The rows in order, in pieces of at most `BATCH_ROWS`. Raises RequestError for a time that cannot be read."""
        row = 0
        with duck() as db:
            for batch in self._read():
                columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                for key in self.keys:
                    columns[key] = columns[key].cast(pa.string())
                columns[self.time] = self._instants(db, columns[self.time], row)
                row += batch.num_rows
                yield pa.table(columns, schema=self.schema)

    def _instants(self, db: duckdb.DuckDBPyConnection, column: pa.Array, row: int) -> pa.Array:
        if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            naive = pa.types.is_date(column.type) or column.type.tz is None
            # A finer unit is cut off: an instant never moves past what was known then.
            found = column.cast(pa.timestamp("us"), safe=False) if naive else column
            found = pc.assume_timezone(found, "UTC") if naive else found.cast(INSTANT, safe=False)
            self.naive_times += len(column) - column.null_count if naive else 0
        else:
            text = column.cast(pa.string())
            db.register("label_times", pa.table({"place": range(len(text)), "time": text}))
            sql = "SELECT TRY_CAST(time AS TIMESTAMPTZ) AS time FROM label_times ORDER BY place"
            read: pa.Table = db.sql(sql).to_arrow_table()
            found = read["time"].combine_chunks().cast(INSTANT)
            unreadable = pc.and_(pc.is_null(found), pc.is_valid(text))
            place = int(pc.index(unreadable, True).as_py())
            if place >= 0:
                raise RequestError(
                    f"{self.name}: row {row + place + 1} has {text[place].as_py()!r} in the time column {self.time!r}, which "
                    "is not an instant; write for example 2030-01-31T12:00:00Z",
                    field=self.time,
                )
            zoned = pc.sum(pc.match_substring_regex(text, _ZONE)).as_py() or 0
            self.naive_times += len(text) - text.null_count - int(zoned)
        if found.null_count:
            place = pc.index(pc.is_null(found), True).as_py()
            raise RequestError(
                f"{self.name}: row {row + place + 1} has nothing in the time column {self.time!r}: a label without an instant "
                "has no point in time; fill it in or leave the row out",
                field=self.time,
            )
        return found


def open_labels(source: Path | str | pa.Table, *, time: str | None = None) -> Labels:
    """Open a label table: a `.parquet`, `.csv` or `.jsonl` file, or an Arrow table.

    `time` names its time column; None takes the only one of a time's type, else the only one with a usual name. Raises
    RequestError if the file cannot be read, has no time column, or has a key column that is not text.
    """
    if isinstance(source, pa.Table):
        name, rows, digest = "the label table", source.num_rows, _table_digest(source)
        schema, read = source.schema, lambda: iter(source.combine_chunks().to_batches(max_chunksize=BATCH_ROWS))
    else:
        path = Path(source)
        name, rows, digest = str(path), None, _file_digest(path)
        if _format(path) == "parquet":
            schema, rows, read = _parquet(path)
        else:
            schema, read = _text(path, time)
    for column in (names := schema.names):
        if names.count(column) > 1:
            raise RequestError(f"{name} has two columns named {column!r}; rename one", field=column)
    chosen = _time_column(name, schema, time)
    fields = []
    for field in schema:
        if field.name in KEY_COLUMNS:
            _check_key(name, field)
            field = pa.field(field.name, pa.string())
        fields.append(pa.field(chosen, INSTANT) if field.name == chosen else field)
    return Labels(name, pa.schema(fields), chosen, digest, rows, read)


def choose_views(labels: Labels, names: Sequence[str] | None = None) -> tuple[FeatureView, ...]:
    """The views called `names`, in that order; None: all whose key columns the labels have.

    Raises RequestError for a view that is not there, or whose key columns are missing, with near matches.
    """
    if names is None:
        chosen = tuple(view for view in VIEWS if set(view.entity.keys) <= set(labels.keys))
        for key in KEY_COLUMNS:
            # A misspelt key would leave its views out without a word.
            if key not in labels.keys and (near := _near(key, labels.schema.names, _TYPO)):
                raise RequestError(
                    f"{labels.name} has no column {key!r} (did you mean {near!r}?); rename it, or name the views that you "
                    f"want: {', '.join(view.name for view in chosen) or 'none fits the table as it is'}",
                    field=near,
                )
        if not chosen:
            raise RequestError(
                f"{labels.name} has no key column of any view; its columns are {', '.join(labels.schema.names)}, and views "
                f"are keyed by {', '.join(KEY_COLUMNS)}: rename a column"
            )
        return chosen
    known = {view.name: view for view in VIEWS}
    for name in names:
        if name not in known:
            hint = f" (did you mean {near}?)" if (near := _near(name, known)) else ""
            raise RequestError(f"there is no view {name!r}{hint}; known: {', '.join(known)}", field=name)
        for key in known[name].entity.keys:
            if key not in labels.keys:
                hint = f" (did you mean {near!r}?)" if (near := _near(key, labels.schema.names)) else ""
                raise RequestError(
                    f"view {name!r} is keyed by {', '.join(known[name].entity.keys)}, and {labels.name} has no column "
                    f"{key!r}{hint}; its columns are {', '.join(labels.schema.names)}: rename one, or leave the view out",
                    field=key,
                )
    return tuple(known[name] for name in dict.fromkeys(names))


def _format(path: Path) -> str:
    found = _FORMATS.get(path.suffix.lower())
    if found is None:
        raise RequestError(f"{path} is not a label table by its name; give a file that ends in {', '.join(_FORMATS)}")
    return found


def _parquet(path: Path) -> tuple[pa.Schema, int, Callable[[], Iterator[pa.RecordBatch]]]:
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise RequestError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error

    def read() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(BATCH_ROWS)

    return schema, rows, read


def _text(path: Path, time: str | None) -> tuple[pa.Schema, Callable[[], Iterator[pa.RecordBatch]]]:
    """CSV and JSONL by DuckDB, in the order of the file. Keys and times stay text: 007 is no 7."""
    csv = _format(path) == "csv"
    call = "read_csv(?, sample_size=-1{})" if csv else "read_json(?, format='newline_delimited', sample_size=-1{})"
    try:
        with duck() as db:
            described = db.execute(f"DESCRIBE SELECT * FROM {call.format('')}", [str(path)]).fetchall()
            types = {str(name): str(kind) for name, kind, *_ in described}
            as_text = {name for name in types if name in KEY_COLUMNS}
            schema = pa.schema(
                pa.field(name, _TIMES.get(kind, pa.string() if name in as_text else pa.null()))
                for name, kind in types.items()
            )
            as_text.add(_time_column(str(path), schema, time))
            typed = ", ".join(
                f"{_quoted(name)}: {_quoted('VARCHAR' if name in as_text else kind)}" for name, kind in types.items()
            )
            call = call.format(f", {'types' if csv else 'columns'}={{{typed}}}")
            none: pa.Table = db.sql(f"SELECT * FROM {call} LIMIT 0", params=[str(path)]).to_arrow_table()
    except duckdb.Error as error:
        raise RequestError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error

    def read() -> Iterator[pa.RecordBatch]:
        with duck() as db:
            try:
                yield from db.sql(f"SELECT * FROM {call}", params=[str(path)]).to_arrow_reader(BATCH_ROWS)
            except (duckdb.Error, pa.ArrowException) as error:
                raise RequestError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error

    return none.schema, read


_TIMES = {"TIMESTAMP": pa.timestamp("us"), "TIMESTAMP WITH TIME ZONE": INSTANT, "DATE": pa.date32()}


def _time_column(name: str, schema: pa.Schema, time: str | None) -> str:
    names = schema.names
    if time is not None:
        if time not in names:
            hint = f" (did you mean {near!r}?)" if (near := _near(time, names)) else ""
            raise RequestError(f"{name} has no column {time!r}{hint}; its columns are {', '.join(names)}", field=time)
        kind = schema.field(time).type
        if not (_is_time(kind) or pa.types.is_null(kind) or _is_text(kind)):
            raise RequestError(
                f"{name}: the time column {time!r} is {kind}, which does not say in which unit; make it a timestamp, or text "
                "such as 2030-01-31T12:00:00Z",
                field=time,
            )
        return time
    typed = [field.name for field in schema if _is_time(field.type)]
    usual = [n for n in names if n in TIME_NAMES and (n in typed or not typed)]
    if len(typed) == 1 or len(usual) == 1:
        return _time_column(name, schema, typed[0] if len(typed) == 1 else usual[0])
    if typed or usual:
        raise RequestError(
            f"{name} has several columns that may be a label's time: {', '.join(typed or usual)}; name the one you mean "
            "(TIME=column with make, --time, time= in Python)"
        )
    raise RequestError(
        f"{name} has no time column: none of {', '.join(names) or 'its columns (there are none)'} is a timestamp or has a "
        f"usual name ({', '.join(TIME_NAMES)}); a training set needs each label's instant: add one, or name it "
        "(TIME=column with make, --time, time= in Python)"
    )


def _check_key(name: str, field: pa.Field) -> None:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise RequestError(
            f"{name}: the key column {field.name!r} is {field.type}, and keys are text; cast it (a whole number with missing "
            "values becomes a fraction in pandas: use its type Int64)",
            field=field.name,
        )


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _near(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _file_digest(path: Path) -> str:
    _format(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RequestError(f"the label table {path} cannot be read: {error.strerror}; check the path") from error


class _Hash(io.RawIOBase):
    """A file that only remembers the hash of what was written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        self.digest.update(view)
        return view.nbytes


def _table_digest(table: pa.Table) -> str:
    sink = _Hash()
    # Its chunks are how it was made, not what it says.
    with pa.ipc.new_stream(pa.PythonFile(sink, "w"), table.schema) as stream:
        stream.write_table(table.combine_chunks())
    return sink.digest.hexdigest()
