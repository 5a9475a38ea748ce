"""What `make score-all` is measured on: people, items and events by a power law, real features, lists and neighbours, and an
exported ranker with random weights, whose speed is that of a trained one."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from infra import registry
from orchestration.compute.artifact import describe_file
from orchestration.compute.copy_rows import copy_rows
from orchestration.compute.duck import duck
from orchestration.compute.export import cut, export_fp32, quantise, random_inputs
from orchestration.compute.folded import fold
from orchestration.compute.half import half
from orchestration.compute.interactions import load_interactions
from orchestration.compute.lake import EVENT_SCHEMA, Lake
from orchestration.compute.lists import refresh_co_visitation, refresh_popular_items
from orchestration.compute.materialise import materialise
from schemas import prompts
from schemas.events import KINDS
from schemas.manifest import (
    MANIFEST_FILE,
    POPULAR_ITEMS,
    RANKER_FP16,
    RANKER_FP32,
    RANKER_INT8,
    RANKER_INT8_PARTS,
    TEXT_PROJECTION,
    Manifest,
)
from schemas.ranker import MAX_HISTORY, SIZES, TEXT_DIM
from schemas.views import VIEWS, candidate_features, context_features, fingerprint
from tests.benchmarks.features_world import names
from tests.rankers import random_ranker

TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
CATEGORIES = 24


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is; `events` per person on average, most people having fewer."""

    people: int = 20_000
    items: int = 100_000
    events: int = 20
    days: int = 60
    ranker: str = "small"


QUICK = Size(people=300, items=400, events=8, days=10)


@dataclass(frozen=True, slots=True)
class World:
    url: str
    artifacts: Path
    version: str

    @property
    def folder(self) -> Path:
        """The artefact."""
        return self.artifacts / "models" / "ranker" / self.version


def build(url: str, folder: Path, size: Size) -> World:
    """Fill the migrated, empty database at `url`; lake and artefact go below `folder`."""
    lake = Lake((folder / "lake").as_uri())
    (folder / "lake").mkdir(parents=True)
    events = _events(size)
    pq.write_table(events, folder / "staged.parquet")
    with psycopg.connect(url, options="-c TimeZone=UTC") as connection:
        _items(connection, size)
        with duck() as db:
            lake.append(connection, [folder / "staged.parquet"], db)
        history = ("user_id", "occurred_at", "event_id", "item_id", "kind", "value")
        copy_rows(connection, "user_history", pa.schema([EVENT_SCHEMA.field(name) for name in history]), [events.select(history).combine_chunks().to_batches()[0]])  # fmt: skip
        interactions = load_interactions(lake, connection)
        refresh_co_visitation(connection, interactions)
        refresh_popular_items(connection, interactions, TODAY)
    yesterday = (TODAY - timedelta(days=1)).date()
    for view in VIEWS:
        materialise(view, yesterday, yesterday, url=url, lake=lake)
    manifest = artifact(folder / "artifacts", size.ranker)
    with psycopg.connect(url, autocommit=True) as connection:
        registry.register(connection, manifest, f"models/ranker/{manifest.version}")
        registry.record_gate(connection, manifest.version, True, {"words": ["random weights"]})
        _item_vectors(connection, manifest, size.items)
        registry.promote(connection, manifest.version)
        connection.execute("VACUUM ANALYZE")
    return World(url, folder / "artifacts", manifest.version)


def artifact(artifacts: Path, size: str) -> Manifest:
    """A ranker of random weights below `artifacts`, with its graphs for CPU and GPU."""
    f, g, d = len(context_features()), len(candidate_features()), SIZES[size].dim
    place = artifacts / "models" / "ranker" / "unfinished"
    place.mkdir(parents=True)
    torch.set_num_threads(1)
    ranker = random_ranker(size, f, g)
    export_fp32(fold(ranker), place / RANKER_FP32, f=f, g=g, d=d)
    export_fp32(half(ranker), place / RANKER_FP16, f=f, g=g, d=d)
    quantise(
        place / RANKER_FP32, place / RANKER_INT8, [random_inputs(1, 20, 64, f=f, g=g, d=d, seed=n) for n in range(16)]
    )
    cut(place / RANKER_INT8, *(place / name for name in RANKER_INT8_PARTS))
    np.savez(place / TEXT_PROJECTION, weight=np.zeros((d, TEXT_DIM), np.float32), bias=np.zeros(d, np.float32))
    (place / POPULAR_ITEMS).write_text(json.dumps([]))
    manifest = Manifest(
        "ranker", size, d, fingerprint(), context_features(), candidate_features(), "none", prompts.DEFAULTS["item"],
        prompts.DEFAULTS["wish"], (TODAY - timedelta(days=1)).isoformat(), 0,
        {file.name: describe_file(file) for file in place.iterdir()},
    )  # fmt: skip
    (place / MANIFEST_FILE).write_text(manifest.to_json())
    place.rename(place.parent / manifest.version)
    return manifest


def _events(size: Size) -> pa.Table:
    rng = np.random.default_rng(0)
    each = np.clip(rng.lognormal(np.log(size.events) - 0.32, 0.8, size.people), 1, MAX_HISTORY).astype(np.int64)
    user = np.repeat(np.arange(size.people), each)
    n = len(user)
    item = np.minimum((size.items * rng.power(0.4, n)).astype(np.int64), size.items - 1)
    kind = np.array(KINDS)[rng.choice(len(KINDS), n, p=(0.5, 0.25, 0.15, 0.05, 0.03, 0.02))]
    value = np.where(kind == "rating", rng.integers(1, 6, n), np.nan)
    first = int((TODAY - timedelta(days=size.days)).timestamp())
    at = pa.array(rng.integers(first, first + size.days * 86_400, n) * 1_000_000, pa.timestamp("us", tz="UTC"))
    columns = [
        names("e", np.arange(n)), names("user", user), names("item", item), pa.array(kind),
        pa.array(value, from_pandas=True), at, at, pa.nulls(n, pa.string()),
    ]  # fmt: skip
    return pa.table(columns, schema=EVENT_SCHEMA)


def _items(connection: psycopg.Connection, size: Size) -> None:
    rng = np.random.default_rng(1)
    with connection.cursor().copy("COPY items (item_id, title, categories, available_at) FROM STDIN") as copy:
        for number in range(size.items):
            own = [f"c{c:02}" for c in sorted(set(rng.integers(0, CATEGORIES, 1 + number % 3).tolist()))]
            new = TODAY - timedelta(days=int(rng.integers(1, 30))) if number % 50 == 0 else None
            copy.write_row((f"item-{number:05d}", f"Item {number}", own, new))
    connection.commit()


def _item_vectors(connection: psycopg.Connection, manifest: Manifest, items: int) -> None:
    vectors = np.random.default_rng(2).standard_normal((items, manifest.dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    connection.execute(
        f"CREATE TABLE item_vectors_{manifest.version} PARTITION OF item_vectors FOR VALUES IN ('{manifest.version}')"
    )
    out = io.StringIO()
    for number, row in enumerate(vectors):
        out.write(f"{manifest.version}\titem-{number:05d}\t[{','.join(f'{x:.4g}' for x in row.tolist())}]\th\n")
    with connection.cursor().copy("COPY item_vectors (model_version, item_id, vector, text_hash) FROM STDIN") as copy:
        copy.write(out.getvalue())
