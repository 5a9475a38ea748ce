"""The record that switches experiments off: a small file beside experiments.toml
(`inference.declared.stopped_place`) that whoever assigns people honours.

    {"<experiment>": {"stopped_at": "<instant>", "reason": "<words>"}}

An experiment in it is over: everybody is served as if it were not declared. Taking the entry out starts it again.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from inference import artifacts
from inference.declared import read
from schemas.errors import DefinitionError


def read_stops(place: str) -> dict[str, tuple[datetime, str]]:
    """When each experiment was stopped by the record at `place`, a path or an `s3://bucket/key`, and why; none without one.

    Raises DefinitionError for a record that cannot be read.
    """
    text = read(place)
    if text is None:
        return {}
    try:
        raw = json.loads(text)
        return {
            name: (datetime.fromisoformat(entry["stopped_at"]), str(entry["reason"])) for name, entry in raw.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DefinitionError(
            f'{place} cannot be read ({error}); it holds {{"<experiment>": {{"stopped_at": "<instant>", "reason": "<words>"}}}}: '
            "mend it, or remove it to start every experiment again"
        ) from error


def stop(place: str, name: str, at: datetime, reason: str) -> bool:
    """Record at `place` that `name` is over; False if it was already, which keeps its first reason. The record appears whole."""
    stops = read_stops(place)
    if name in stops:
        return False
    stops[name] = (at, reason)
    text = json.dumps(
        {one: {"stopped_at": when.isoformat(), "reason": why} for one, (when, why) in stops.items()}, indent=1
    )
    root, _, file = place.rpartition("/")
    artifacts.put(root if place.startswith("s3://") else Path(root).resolve().as_uri(), file, f"{text}\n".encode())
    return True
