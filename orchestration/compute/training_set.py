"""The training set: recent labels with their context as known at the label, versioned, as Parquet."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from inference import artifacts
from orchestration.compute import learning_steps
from orchestration.compute.interactions import Interactions, load_interactions, newest_known
from orchestration.compute.lake import Lake
from orchestration.compute.mining import recent_rows
from orchestration.compute.point_in_time import PointInTime
from orchestration.compute.slates import Slates
from orchestration.compute.splits import Split, leave_one_out
from orchestration.compute.tombstones import count_erasures, no_erasure_since
from schemas.errors import DefinitionError
from schemas.views import CONTEXT_VIEWS, context_features

PATH = "training/training_set.parquet"
LEAST_EVENTS = 1_000
LEAST_PEOPLE = 20


@dataclass(frozen=True, slots=True)
class TrainingSetReport:
    """What was written."""

    labels: int
    people: int
    null_rate: float
    size_bytes: int
    version: str


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Labels as rows of `split.train`, ascending, with context values and mask `(l, f) float32`.

    `known_until` is when the store had learned of the last of its events; later ones are not part of it.
    """

    version: str
    known_until: datetime | None

    split: Split
    rows: NDArray[np.int64]
    context: NDArray[np.float32]
    context_mask: NDArray[np.float32]


def load_categories(connection: psycopg.Connection[Any], interactions: Interactions) -> list[list[str]]:
    """Each catalogue item's categories, in the order of `interactions.item_ids`."""
    found = dict(connection.execute("SELECT item_id, categories FROM items").fetchall())
    return [found.get(item_id, []) for item_id in interactions.item_ids.tolist()]


def too_few(events: int, people: int) -> str | None:
    """Why nothing can be learned from so few; None if it can."""
    if events >= LEAST_EVENTS and people >= LEAST_PEOPLE:
        return None
    return (
        f"{events} events of {people} people are too few to train on: {LEAST_EVENTS} events of {LEAST_PEOPLE} people "
        "are needed. Until then the floor (co-visitation and trending) serves"
    )


def learning_split(lake: Lake, connection: psycopg.Connection[Any], known_until: datetime | None = None) -> Split:
    """Leave-one-out over the events of the lake that the store knew of at `known_until` (None: all), as they were served.

    Raises DefinitionError if there is too little to learn from.
    """
    interactions = load_interactions(lake, connection, known_until, as_served=True)
    if words := too_few(len(interactions), len(np.unique(interactions.user))):
        raise DefinitionError(words)
    return leave_one_out(interactions)


def build_training_set(lake: Lake, connection: psycopg.Connection[Any], artifacts_url: str) -> TrainingSetReport:
    """Write the training set of the lake as it stands. Raises Overtaken if somebody is forgotten meanwhile."""
    seen = count_erasures(connection)
    known_until = newest_known(lake, connection)
    split = learning_split(lake, connection, known_until)
    rows = recent_rows(split.train)
    with PointInTime(lake, connection) as ask:
        values, mask = Slates(ask, split.train, load_categories(connection, split.train)).context(rows)
    table = pa.table(
        {
            "label_row": rows,
            "user_id": split.train.user_ids[split.train.user[rows]].astype(object),
            "item_id": split.train.item_ids[split.train.item[rows]].astype(object),
            "occurred_at": pa.array(split.train.occurred_at[rows], pa.timestamp("us", tz="UTC")),
            "context": pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1]),
            "context_mask": pa.FixedSizeListArray.from_arrays(mask.ravel(), mask.shape[1]),
        }
    ).replace_schema_metadata(
        {
            "version": _version(split.train),
            "known_until": "" if known_until is None else known_until.isoformat(),
            "features": ",".join(context_features()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    with no_erasure_since(connection, seen):
        artifacts.put(artifacts_url, PATH, buffer.getvalue())
        learning_steps.done(artifacts_url, _version(split.train), "training_set")
    people = len(np.unique(split.train.user[rows]))
    return TrainingSetReport(len(rows), people, float(1 - mask.mean()), buffer.tell(), _version(split.train))


def load_training_set(lake: Lake, connection: psycopg.Connection[Any], artifacts_url: str) -> TrainingSet:
    """The training set last written, with the events it was made of: what became known later is not among them.

    Raises ArtifactError without one, DefinitionError if definitions have changed since, or events that it was made of.
    """
    table = pq.read_table(io.BytesIO(artifacts.get(artifacts_url, PATH)))
    about = table.schema.metadata or {}
    until = about.get(b"known_until", b"").decode()
    known_until = datetime.fromisoformat(until) if until else None
    split = learning_split(lake, connection, known_until)
    version = about.get(b"version", b"").decode()
    if version != _version(split.train):
        raise DefinitionError(
            "the training set was built from other events or definitions; materialise training_set again"
        )

    def block(name: str) -> NDArray[np.float32]:
        column = table[name].combine_chunks()
        return np.asarray(column.flatten(), np.float32).reshape(len(table), -1)

    return TrainingSet(
        version, known_until, split, np.asarray(table["label_row"]), block("context"), block("context_mask")
    )


def _version(interactions: Interactions) -> str:
    digest = hashlib.sha256("".join(view.definition_hash for view in CONTEXT_VIEWS).encode())
    for array in (interactions.user, interactions.item, interactions.occurred_at, interactions.kind):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
