"""Which source a value of DATA means."""

from __future__ import annotations

from dataclasses import fields
from datetime import date, datetime
from pathlib import Path
from urllib.parse import parse_qsl

from orchestration.sources import Source
from orchestration.sources.movielens import open_movielens
from orchestration.sources.simulator import Simulator
from orchestration.sources.simulator_world import World
from orchestration.sources.tabular import Tabular
from orchestration.sources.tabular_files import is_s3, open_store
from schemas.errors import SourceError

SIMULATED = "simulated"


def open_source(data: str | None, *, start: date, until: datetime) -> Source:
    """The source for `data`: a folder, an s3:// prefix, or the simulator from `start` until `until`.

    None and `simulated` mean the simulator's default world; `simulated?people=20000&seed=3` sets any field of `World`.

    A larder.toml decides before any file name does. Raises SourceError if there is nothing to read, saying what is known.
    """
    if is_simulated(data):
        return Simulator(simulated_world(data, start), until)
    assert data is not None
    if is_s3(data):
        return Tabular(data)
    folder = Path(data).expanduser()
    open_store(folder)  # a missing or empty folder is told as such
    if not (folder / "larder.toml").is_file():
        movielens = open_movielens(folder)
        if movielens is not None:
            return movielens
    return Tabular(folder)


def is_simulated(data: str | None) -> bool:
    """True if `data` asks for the simulator."""
    return not data or data.split("?", 1)[0] == SIMULATED


def simulated_world(data: str | None, start: date) -> World:
    """The world that `simulated?field=value&…` describes. Raises SourceError for a field or value it cannot have."""
    kinds = {field.name: field.type for field in fields(World) if field.name != "start"}
    values: dict[str, int | float] = {}
    for name, value in parse_qsl((data or "").partition("?")[2], keep_blank_values=True):
        if name not in kinds:
            raise SourceError(f"a simulated world has no {name!r}; it has {', '.join(kinds)}")
        try:
            values[name] = float(value) if kinds[name] == "float" else int(value)
        except ValueError:
            raise SourceError(f"simulated world: {name} is {value!r}; give a number") from None
    return World(start=start, **values)  # type: ignore[arg-type]  # numbers of the fields' own kinds
