"""Which source a value of DATA means."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path

from orchestration.sources import Source
from orchestration.sources.movielens import KNOWN_LAYOUTS, open_movielens
from orchestration.sources.simulator import Simulator
from orchestration.sources.simulator_world import World
from orchestration.sources.tabular import EXAMPLE, Tabular
from orchestration.sources.tabular_files import SUFFIXES, is_s3, open_store
from schemas.errors import SourceError


def open_source(data: str | None, *, start: date, until: datetime) -> Source:
    """The source for `data`: None is the simulator from `start` until `until`, else a folder or an s3:// prefix.

    A larder.toml decides before any file name does. Raises SourceError if there is nothing to read, saying what is known.
    """
    if not data:
        return Simulator(World(start=start), until)
    if is_s3(data):
        return Tabular(data)
    folder = Path(data).expanduser()
    store = open_store(folder)
    if not (folder / "larder.toml").is_file():
        movielens = open_movielens(folder)
        if movielens is not None:
            return movielens
        files = [file.name for file in store.files()]
        if not any(name.endswith(SUFFIXES) for name in files):
            raise SourceError(
                f"{folder}: unknown layout, found {', '.join(files[:8])}; known: {'; '.join(KNOWN_LAYOUTS)}. "
                f"A larder.toml looks like this:\n\n{EXAMPLE}"
            )
    return Tabular(folder)
