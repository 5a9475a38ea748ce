"""The ids of all events, in Postgres: what tells a repeated event without reading the lake.

Two things hold after every transaction: the id of every event in the lake is here, and no posted event that waits to be
drained is in the lake already. So what is drained is new to the lake, and no day but its own is read.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.csv as pa_csv

_NO_HEADER = pa_csv.WriteOptions(include_header=False)


def take_keys(connection: psycopg.Connection[Any], batches: Iterable[pa.RecordBatch]) -> None:
    """Note that the lake has these events: `batches` of `event_id, occurred_at`, in the caller's transaction.

    A posted event of the same id that waits to be drained has arrived in the lake by this way, and waits no longer.
    """
    connection.execute("DROP TABLE IF EXISTS taken_keys")
    connection.execute("CREATE TEMP TABLE taken_keys (event_id text, occurred_at timestamptz) ON COMMIT DROP")
    with connection.cursor().copy("COPY taken_keys FROM STDIN (FORMAT csv)") as copy:
        for batch in batches:
            buffer = io.BytesIO()
            pa_csv.write_csv(batch, buffer, _NO_HEADER)
            copy.write(buffer.getvalue())
    connection.execute("ANALYZE taken_keys")
    # In order of the key, so that two writers of the same events cannot block each other.
    connection.execute("INSERT INTO event_keys SELECT * FROM taken_keys ORDER BY event_id ON CONFLICT DO NOTHING")
    # Posts of an id that is taken here waited for this transaction or are seen now: none falls between.
    connection.execute(
        "UPDATE recent_events AS r SET drained = true FROM taken_keys AS k WHERE NOT r.drained AND r.event_id = k.event_id"
    )
