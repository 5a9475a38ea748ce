"""Folders under LAKE_URL for what two engines hand each other; each goes with the work that made it.

What a killed process left goes with the next erasure, as it may hold rows of somebody who was forgotten, or once it
is a week old, whichever comes first.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from orchestration.compute.file_roots import open_root

_FOLDER = "scratch"
_NAME = re.compile(r"^(?P<erasures>\d+)-(?P<made>\d{8}T\d{6})-[0-9a-f]+$")
_MADE = "%Y%m%dT%H%M%S"
_KEPT = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Scratch:
    """One folder, by its path in `files`."""

    path: str
    files: pafs.FileSystem

    def write(self, name: str, table: pa.Table) -> str:
        """Write `table` as the Parquet file `name`; returns its path."""
        path = f"{self.path}/{name}"
        with self.files.open_output_stream(path) as stream:
            pq.write_table(table, stream, compression="zstd")
        return path

    def read(self, name: str) -> ds.Dataset:
        """The Parquet files below the folder `name`, as a dataset that is scanned when it is read."""
        return ds.dataset(f"{self.path}/{name}", filesystem=self.files, format="parquet")


@contextmanager
def open_scratch(lake_url: str, erasures: int) -> Iterator[Scratch]:
    """A new folder for what is computed from a lake that saw `erasures` erasures; removed at the exit."""
    root, files = open_root(lake_url)
    _remove(root, files, before=0)
    name = f"{erasures}-{datetime.now(UTC).strftime(_MADE)}-{uuid.uuid4().hex[:8]}"
    scratch = Scratch(f"{root}/{_FOLDER}/{name}", files)
    files.create_dir(scratch.path, recursive=True)
    try:
        yield scratch
    finally:
        _delete(files, scratch.path)


def remove_scratch(lake_url: str, erasures: int) -> int:
    """Remove the folders of what was computed before there were `erasures` erasures; returns how many.

    Work that still goes on in one fails; its writer would have refused it anyway, and begins again.
    """
    return _remove(*open_root(lake_url), before=erasures)


def _remove(root: str, files: pafs.FileSystem, *, before: int) -> int:
    oldest = (datetime.now(UTC) - _KEPT).strftime(_MADE)
    removed = 0
    for info in files.get_file_info(pafs.FileSelector(f"{root}/{_FOLDER}", allow_not_found=True)):
        named = _NAME.match(info.base_name)
        if named and (int(named["erasures"]) < before or named["made"] < oldest):
            _delete(files, info.path)
            removed += 1
    return removed


def _delete(files: pafs.FileSystem, path: str) -> None:
    # An erasure, or the process whose folder it is, may have been first.
    if files.get_file_info(path).type != pafs.FileType.NotFound:
        files.delete_dir(path)
