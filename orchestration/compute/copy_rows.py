"""Arrow batches into a table of Postgres: binary COPY, the rows laid out by numpy, a column at a time.

A driver that lays out field by field takes longer than the server does to store the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa

_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"
_CHUNK_BYTES = 2 << 20
Chunk = bytes | memoryview
# Arrow counts from 1970, Postgres from 2000.
_EPOCHS = {pa.date32(): 10_957, pa.timestamp("us", tz="UTC"): 946_684_800_000_000}


def copy_rows(connection: psycopg.Connection[Any], table: str, schema: pa.Schema, batches: Iterable[Any]) -> int:
    """COPY record batches into the columns of `table` that `schema` names; returns how many rows the server took.

    `schema` has text, int64, float64, date32 and UTC timestamps in µs only: a binary COPY takes no other type than the
    column's. The next chunk is laid out while the server stores the one before; no more than two are held.
    """
    chunks: Iterator[Chunk] = chain(
        [_HEADER], (chunk for batch in batches for chunk in _laid_out(batch.cast(schema))), [_TRAILER]
    )
    with ThreadPoolExecutor(1) as ahead, connection.cursor() as cursor:
        with cursor.copy(f"COPY {table} ({', '.join(schema.names)}) FROM STDIN (FORMAT binary)") as copy:
            upcoming = ahead.submit(next, chunks, None)
            while (chunk := upcoming.result()) is not None:
                upcoming = ahead.submit(next, chunks, None)
                copy.write(chunk)
        return cursor.rowcount


def _laid_out(batch: Any) -> Iterator[Chunk]:
    """The batch's rows `(n,)` as COPY wants them, in chunks of bounded size however long a text is."""
    if not len(batch):
        return
    widths = [_width(column) for column in batch.columns]
    row_bytes = 2 + sum(4 + width for width in widths)
    if len(batch) > 1 and len(batch) * row_bytes > _CHUNK_BYTES:
        half = len(batch) // 2
        yield from _laid_out(batch.slice(0, half))
        yield from _laid_out(batch.slice(half))
    else:
        yield _rows(batch.columns, widths)


def _width(column: Any) -> int:
    """Bytes of the column's longest value."""
    if not pa.types.is_string(column.type):
        return int(column.type.bit_width) // 8
    return int(np.diff(_offsets(column)).max())


def _rows(columns: Sequence[Any], widths: Sequence[int]) -> Chunk:
    """The columns `(n,)` as rows: every value padded to its column's width first, the padding left out in the end."""
    fields: list[tuple[Any, ...]] = [("columns", ">i2")]
    for place, (column, width) in enumerate(zip(columns, widths, strict=True)):
        kind = {4: ">i4", 8: ">f8" if pa.types.is_floating(column.type) else ">i8"}
        value = ("u1", (width,)) if pa.types.is_string(column.type) else (kind[width],)
        fields += [(f"bytes_{place}", ">i4"), (f"value_{place}", *value)]
    layout = np.dtype(fields)
    rows = np.empty(len(columns[0]), layout)
    kept = np.ones((len(rows), layout.itemsize), np.bool_)
    rows["columns"] = len(columns)
    for place, (column, width) in enumerate(zip(columns, widths, strict=True)):
        (_, begin) = layout.fields[f"value_{place}"][:2]  # type: ignore[index]  # the layout has fields
        padding = kept[:, begin : begin + width]
        if pa.types.is_string(column.type):
            lengths = _fill_text(rows[f"value_{place}"], column, padding)
        else:
            rows[f"value_{place}"] = _numbers(column)
            lengths = np.full(len(rows), width)
        if column.null_count:
            missing = column.is_null().to_numpy(zero_copy_only=False)
            lengths = np.where(missing, -1, lengths)
            padding[missing] = False
        rows[f"bytes_{place}"] = lengths
    flat = rows.view(np.uint8).reshape(kept.shape)
    return (flat.reshape(-1) if kept.all() else flat[kept]).data


def _numbers(column: Any) -> np.ndarray:
    """A column's values `(n,)` as Postgres counts them, anything where there is none."""
    if (epoch := _EPOCHS.get(column.type)) is None:
        found: np.ndarray = column.fill_null(0).to_numpy()
        return found
    whole = column.view(pa.int32() if pa.types.is_date(column.type) else pa.int64())
    return whole.fill_null(epoch).to_numpy() - epoch  # type: ignore[no-any-return]


def _fill_text(into: np.ndarray, column: Any, padding: np.ndarray) -> np.ndarray:
    """Put the texts into `into` `(n, width)`, clear `padding` `(n, width)` behind each; returns their bytes `(n,)`."""
    offsets, data = _offsets(column), column.buffers()[2]
    lengths = np.diff(offsets)
    if into.size and (lengths == into.shape[1]).all():
        into[:] = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]].reshape(into.shape)
    elif into.size:
        letters = np.frombuffer(data, np.uint8)
        places = np.arange(into.shape[1])
        into[:] = letters[np.minimum(offsets[:-1, None] + places, len(letters) - 1)]
        np.less(places, lengths[:, None], out=padding)
    return lengths


def _offsets(column: Any) -> np.ndarray:
    """Where each text of the column begins and the last one ends, `(n + 1,)` int32."""
    return np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
