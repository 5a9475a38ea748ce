"""How far the training set at hand has come on its way to a model, so that an interrupted way is gone on with."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from inference import artifacts
from orchestration.compute.lake import Lake
from schemas.errors import ArtifactError, DefinitionError

PATH = "training/steps.json"
STEPS = ("training_set", "ranker", "ranker_evaluation", "ranker_onnx")
"""The assets in their order."""


def done(artifacts_url: str, version: str, step: str) -> None:
    """Record that `step` is finished for the training set of this `version`."""
    record = {"training_set": version, "done": step, "at": datetime.now(UTC).isoformat()}
    artifacts.put(artifacts_url, PATH, json.dumps(record).encode())


def left(lake: Lake, connection: psycopg.Connection[Any], artifacts_url: str, *, newest: timedelta) -> tuple[str, ...]:
    """The steps still to go: all of them, unless some were finished at most `newest` ago and what they were made of
    still holds."""
    from orchestration.compute.training_set import load_training_set

    try:
        record = json.loads(artifacts.get(artifacts_url, PATH))
        finished = STEPS.index(record["done"])
        if finished == len(STEPS) - 1 or datetime.now(UTC) - datetime.fromisoformat(record["at"]) > newest:
            return STEPS
        known = load_training_set(lake, connection, artifacts_url)
    except (ArtifactError, DefinitionError, ValueError, KeyError):
        return STEPS  # never begun, or begun from what is no longer there: anew
    return STEPS[finished + 1 :] if known.version == record["training_set"] else STEPS


def too_few(connection: psycopg.Connection[Any]) -> str | None:
    """Why nothing can be learned from the events that are there; None if it can."""
    from orchestration.compute import training_set

    events, people = connection.execute(
        "SELECT coalesce((SELECT sum(rows) FROM lake_files), 0)::bigint, "
        "(SELECT count(*) FROM (SELECT DISTINCT user_id FROM user_history) AS people)"
    ).fetchone() or (0, 0)
    return training_set.too_few(events, people)
