"""The record that switches experiments off: a small file beside experiments.toml that whoever assigns people honours.

    {"<experiment>": {"stopped_at": "<instant>", "reason": "<words>"}}

An experiment in it is over: everybody is served as if it were not declared. Taking the entry out starts it again.
"""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

from schemas.errors import DefinitionError

SUFFIX = ".stopped.json"


def stops_file(experiments: Path) -> Path:
    """The record that belongs to the declarations in `experiments`."""
    return experiments.with_name(experiments.stem + SUFFIX)


def read_stops(file: Path) -> dict[str, tuple[datetime, str]]:
    """When each experiment in it was stopped, and why. Raises DefinitionError for a file that cannot be read."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return {
            name: (datetime.fromisoformat(entry["stopped_at"]), str(entry["reason"])) for name, entry in raw.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DefinitionError(
            f'{file} cannot be read ({error}); it holds {{"<experiment>": {{"stopped_at": "<instant>", "reason": "<words>"}}}}: '
            "mend it, or remove it to start every experiment again"
        ) from error


def stop(file: Path, name: str, at: datetime, reason: str) -> bool:
    """Record that `name` is over; False if it was already, which keeps its first reason. The file appears whole."""
    stops = read_stops(file)
    if name in stops:
        return False
    stops[name] = (at, reason)
    text = json.dumps(
        {one: {"stopped_at": when.isoformat(), "reason": why} for one, (when, why) in stops.items()}, indent=1
    )
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as out:
        out.write(text + "\n")
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)
    return True
