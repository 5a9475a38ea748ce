"""Items in the memory of the process: titles, vectors and packed features, so that a request need not look them up.

A request asks Postgres for its candidates' ids and for what happened today; all that changes seldom it takes from here.
What is here was read at one moment together with the state of the log of changes (schemas/catalogue_sql.py), and every
request reads that state anew beside the person: as long as it is the same, these are the tables' rows; from the moment
on in which it is another, requests read the tables, until a thread has read everything again.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from inference.cached_items import CachedItems
from inference.candidates import CategoryNumbers
from inference.live import Floats, Layout, layout_of
from inference.sql_files import statement
from inference.store import Store
from schemas import catalogue_sql, online_sql
from schemas.errors import Unavailable
from schemas.features import ITEM, FeatureView

logger = logging.getLogger(__name__)

ITEMS_AT_ONCE = 4_000
_PAUSE_SECONDS = 0.02
"""Between two parts of a reading: requests come first."""
_READ_MS = 60_000.0
_REST = 20.0
"""After a reading the next one begins not before so many times its length have passed: a catalogue that is written to all
the time is not read all the time."""
_TRY_AGAIN_SECONDS = 30.0
_NO_DAY = np.iinfo(np.int32).min


class ItemCache:
    """Keeps at most `most` items, read from the database at `url` beside the requests. Safe between threads."""

    def __init__(self, url: str, most: int) -> None:
        self.most = most
        self._store = Store(url, 1, "the database (items)")
        self._items: CachedItems | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._not_before = 0.0
        self._closed = threading.Event()

    def get(self, state: str | None, model_version: str, dim: int) -> CachedItems | None:
        """The items as they are in the state `state` of the log, with the vectors `(N, dim)` of a model.

        None while they are not here; they are then being read, for a later request. Never waits.
        """
        items = self._items
        if items is not None and items.state == state and items.model_version == model_version:
            return items
        if self.most and state is not None:
            self._begin(model_version, dim)
        return None

    def wait(self, seconds: float) -> bool:
        """Wait until what is being read is read; False if it takes longer."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
        return thread is None or not thread.is_alive()

    def restored(self) -> None:
        """Begin anew in a process that woke from a snapshot: another machine's clock says nothing of when to read again."""
        self._not_before = 0.0
        self._store.restored()

    def close(self) -> None:
        """End a reading, and let go of the connection and of what was read."""
        self._closed.set()
        self._store.close()
        self._items = None

    def _begin(self, model_version: str, dim: int) -> None:
        with self._lock:
            busy = self._thread is not None and self._thread.is_alive()
            if busy or self._closed.is_set() or time.monotonic() < self._not_before:
                return
            self._thread = threading.Thread(
                target=self._work, args=(model_version, dim), name="larder-items", daemon=True
            )
            self._thread.start()

    def _work(self, model_version: str, dim: int) -> None:
        began = time.monotonic()
        rest = _TRY_AGAIN_SECONDS
        try:
            with self._store.connection(_READ_MS) as connection:
                items = self._read(connection, model_version, dim)
            if items is not None and not self._closed.is_set():
                self._items = items
                rest = (time.monotonic() - began) * _REST
        except (psycopg.Error, Unavailable, ValueError) as error:
            logger.warning("items are not kept in memory, requests look them up: %s", type(error).__name__)
        finally:
            self._not_before = time.monotonic() + rest
            self._store.close()  # it is used seldom

    def _read(self, connection: psycopg.Connection[Any], model_version: str, dim: int) -> CachedItems | None:
        """All items in one snapshot; None if they are too many, or if nothing notes what is written to them."""
        layout = layout_of(ITEM)
        reading = _Reading(layout, dim)
        with connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            cursor = connection.cursor(binary=True)
            unnoted = [name for (name,) in cursor.execute(catalogue_sql.MISSING).fetchall()]
            if unnoted:
                logger.warning(
                    "items are not kept in memory, requests look them up: nothing notes what is written to %s; "
                    "`make run` or `make serve` with this version puts the triggers there",
                    ", ".join(unnoted),
                )
                return None
            row = cursor.execute(f"SELECT {catalogue_sql.STATE}, (SELECT count(*) FROM items)").fetchone()
            assert row is not None
            state, many = row
            if many > self.most:
                logger.warning(
                    "items are not kept in memory, requests look them up: there are %d, and LARDER_ITEM_CACHE is %d",
                    many,
                    self.most,
                )
                return None
            after: str | None = ""
            while after is not None and not self._closed.is_set():
                after = reading.add(
                    cursor.execute(
                        _read_sql(dim), {"version": model_version, "after": after, "limit": ITEMS_AT_ONCE}
                    ).fetchone()
                )
                time.sleep(_PAUSE_SECONDS)
        return None if self._closed.is_set() else reading.items(state, model_version)


class _Reading:
    """The parts of a reading, put together."""

    def __init__(self, layout: Layout, dim: int) -> None:
        self.layout, self.dim = layout, dim
        self.item_ids: list[str] = []
        self.titles: list[str] = []
        self.categories: list[list[str]] = []
        self.arrays: list[tuple[NDArray[Any], ...]] = []
        self._lists: dict[str, list[str]] = {}
        self._one_of_each: dict[str, str] = {}

    def add(self, row: Sequence[Any] | None) -> str | None:
        """One row of inference/sql/read_items.sql; gives the last id, None if there was no item."""
        assert row is not None
        n, last, item_ids, titles, categories, available_at, has_vector, vectors, *views = row
        if last is None:
            return None
        self.item_ids += item_ids.decode().split("\0")
        self.titles += titles.decode().split("\0")
        self.categories += map(self._list, categories.decode().split("\0"))
        there = np.frombuffer(has_vector, np.bool_)
        rows = np.zeros((n, self.dim), np.float16)
        if vectors is not None:
            # pgvector sends an int16 dimension and an unused int16 before the numbers.
            rows[there] = np.frombuffer(vectors, ">f2").reshape(-1, self.dim + 2)[:, 2:]
        days, states = self._states(n, views)
        self.arrays.append((np.frombuffer(available_at, ">f8").astype(np.float64), rows, there, days, states))
        return str(last)

    def items(self, state: str, model_version: str) -> CachedItems:
        layout = self.layout
        nothing = (
            np.zeros(0),
            np.zeros((0, self.dim), np.float16),
            np.zeros(0, np.bool_),
            np.zeros((0, len(layout.views)), np.int32),
            np.zeros((0, len(layout.view_of))),
        )
        available_at, vectors, there, days, states = (
            np.concatenate(parts) for parts in zip(*(self.arrays or [nothing]), strict=True)
        )
        places = {item_id: place for place, item_id in enumerate(self.item_ids)}
        if not len(places) == len(self.titles) == len(self.categories) == len(available_at):
            raise ValueError("the parts of the items do not fit together")
        return CachedItems(
            state, model_version, places, self.titles, self.categories, self._numbered(),
            available_at, vectors, there, days, states,
        )  # fmt: skip

    def _numbered(self) -> CategoryNumbers:
        """The categories of all items as numbers."""
        numbers = {name: number for number, name in enumerate(self._one_of_each)}
        lists = list(self._lists.values())
        of_list = np.full((len(lists), max(map(len, lists), default=0)), len(numbers), np.int32)
        for row, names in enumerate(lists):
            of_list[row, : len(names)] = [numbers[name] for name in names]
        at = {id(names): row for row, names in enumerate(lists)}
        return CategoryNumbers(of_list[[at[id(names)] for names in self.categories]], numbers)

    def _list(self, written: str) -> list[str]:
        """Items of the same categories share one list of them."""
        found = self._lists.get(written)
        if found is None:
            found = self._lists[written] = [self._one_of_each.setdefault(name, name) for name in json.loads(written)]
        return found

    def _states(self, n: int, views: Sequence[bytes | None]) -> tuple[NDArray[np.int32], Floats]:
        layout = self.layout
        days = np.full((n, len(layout.views)), _NO_DAY, np.int32)
        states = np.full((n, len(layout.view_of)), np.nan)
        for number, span in enumerate(layout.spans):
            flags, when, packed = views[3 * number : 3 * number + 3]
            if packed is None:
                continue
            assert flags is not None
            assert when is not None
            there = np.flatnonzero(np.frombuffer(flags, np.bool_))
            words = np.frombuffer(packed, ">i8").reshape(len(there), -1)
            # A row packed by another definition would be read as other states: it counts as missing.
            fit = words[:, 0] == layout.hashes[number]
            days[there[fit], number] = np.frombuffer(when, ">i4")[fit]
            states[there[fit], span] = words[fit, 1:].view(">f8")
        return days, states


def _read_sql(dim: int) -> str:
    columns, read = "", ""
    for view in layout_of(ITEM).views:
        read += f", {_fit(view)} AS {view.name}, r.{view.name}_date - date '1970-01-01' AS {view.name}_day"
        columns += (
            f",\n    string_agg(boolsend({view.name} IS NOT NULL), ''::bytea ORDER BY item_id) AS has_{view.name}"
            f",\n    string_agg(CASE WHEN {view.name} IS NOT NULL THEN int4send({view.name}_day) END, ''::bytea ORDER BY item_id) AS {view.name}_days"
            f",\n    string_agg({view.name}, ''::bytea ORDER BY item_id) AS {view.name}"
        )
    return statement("read_items").format(dim=dim, columns=columns, read=read, rows=online_sql.rows_table(ITEM))


def _fit(view: FeatureView) -> str:
    """The packed row, if it can be one of this definition."""
    return f"CASE WHEN octet_length(r.{view.name}) = {online_sql.packed_bytes(view)} THEN r.{view.name} END"
