"""DuckDB in this process: one for a large question, or the one that is kept open for small ones."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import duckdb

_MEMORY_LIMIT = "2GB"


@contextmanager
def duck(memory_limit: str = _MEMORY_LIMIT) -> Iterator[duckdb.DuckDBPyConnection]:
    """An in-process DuckDB in UTC that spills to a temporary folder instead of growing past `memory_limit`."""
    with (
        tempfile.TemporaryDirectory(prefix="larder-duckdb-") as spill,
        duckdb.connect(config={"memory_limit": memory_limit, "temp_directory": spill, "threads": "2"}) as connection,
    ):
        connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
        yield connection


def shared_duck() -> duckdb.DuckDBPyConnection:
    """A connection of its own to the one DuckDB that this process keeps open for small questions: opening one takes longer
    than they do. Close it when you are done."""
    connection = _kept_open().cursor()
    connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
    return connection


@cache
def _kept_open() -> duckdb.DuckDBPyConnection:
    kept = ExitStack()
    # Nobody may hold it when the interpreter ends, or DuckDB complains of what is left.
    kept.callback(_kept_open.cache_clear)
    atexit.register(kept.close)
    return kept.enter_context(duck())
