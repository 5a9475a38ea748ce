"""A small deployment that serves: features, two released models of the same shape with vectors of their own, and lists."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import psycopg
from conftest import TODAY, days_ago, replace_database
from pgvector import HalfVector
from pgvector.psycopg import register_vector
from rankers import random_ranker
from worlds import ListSource

from infra import registry
from orchestration.compute.export import export_fp32
from orchestration.compute.folded import fold
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from schemas.events import Event, Item
from schemas.manifest import (
    CHAMPION_POINTER,
    MANIFEST_FILE,
    POPULAR_ITEMS,
    RANKER_FP32,
    TEXT_PROJECTION,
    ArtifactFile,
    Manifest,
)
from schemas.ranker import SIZES, TEXT_DIM
from schemas.views import VIEWS, candidate_features, context_features, fingerprint

ITEMS = tuple(f"i{number:02}" for number in range(40))
PEOPLE = tuple(f"u{number}" for number in range(6))
CATEGORIES = ("odd", "even")
_numbers = itertools.count()


def category(item_id: str) -> str:
    return CATEGORIES[int(item_id[1:]) % 2 == 0]


@dataclass(frozen=True)
class Released:
    """Where it is, and its two versions; the first serves."""

    url: str
    artifacts: Path
    versions: tuple[str, str]

    @property
    def artifacts_url(self) -> str:
        return self.artifacts.as_uri()

    def folder(self, version: str) -> Path:
        return self.artifacts / "models" / "ranker" / version

    def promote(self, version: str) -> None:
        """What `ranker_release` does: move the alias, then publish where it points."""
        with psycopg.connect(self.url) as connection:
            registry.promote(connection, version)
        publish_pointer(self.artifacts, version)


def publish_pointer(artifacts: Path, version: str) -> None:
    pointer = {"version": version, "path": f"models/ranker/{version}"}
    (artifacts / CHAMPION_POINTER).write_text(json.dumps(pointer))


@contextmanager
def released(postgres_url: str, template: str, folder: Path) -> Iterator[Released]:
    """Build one in a database of its own and below `folder`."""
    name = f"larder_released_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    url = replace_database(postgres_url, name)
    try:
        artifacts = folder / "artifacts"
        versions = (write_release(artifacts, 1), write_release(artifacts, 2))
        _fill(url, folder, artifacts, versions)
        made = Released(url, artifacts, versions)
        made.promote(versions[0])
        yield made
    finally:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def write_release(artifacts: Path, seed: int) -> str:
    """An artefact with seeded weights below `artifacts`; its version."""
    f, g, d = len(context_features()), len(candidate_features()), SIZES["small"].dim
    place = artifacts / "models" / "ranker" / f"seed-{seed}"
    place.mkdir(parents=True)
    export_fp32(fold(random_ranker("small", f, g, seed)), place / RANKER_FP32, f=f, g=g, d=d)
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((d, TEXT_DIM)).astype(np.float32)
    np.savez(place / TEXT_PROJECTION, weight=weight, bias=np.zeros(d, np.float32))
    popular = [
        {"item_id": item, "title": f"Title {item}", "score": 1.0 / (row + 1), "categories": [category(item)]}
        for row, item in enumerate(ITEMS)
    ]
    (place / POPULAR_ITEMS).write_text(json.dumps(popular))
    files = {
        file.name: ArtifactFile(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in place.iterdir()
    }
    manifest = Manifest(
        "ranker", "small", d, fingerprint(), context_features(), candidate_features(), "none", "item.v1", "wish.v1",
        "2026-01-01T00:00:00+00:00", seed, files,
    )  # fmt: skip
    (place / MANIFEST_FILE).write_text(manifest.to_json())
    place.rename(artifacts / "models" / "ranker" / manifest.version)
    return manifest.version


def _fill(url: str, folder: Path, artifacts: Path, versions: tuple[str, ...]) -> None:
    lake = Lake((folder / "lake").as_uri())
    events = [
        Event(
            f"{person}-{n}",
            person,
            ITEMS[(start * 7 + n * 3) % len(ITEMS)],
            "rating",
            float(1 + n % 5),
            days_ago(n + 0.5),
        )
        for start, person in enumerate(PEOPLE)
        for n in range(8)
    ]
    items = [Item(item, f"Title {item}", categories=(category(item),)) for item in ITEMS]
    with psycopg.connect(url, options="-c TimeZone=UTC") as connection:
        ingest(ListSource(events, list(items)), lake, connection, now=TODAY)
    yesterday = (TODAY - timedelta(days=1)).date()
    for view in VIEWS:
        materialise(view, yesterday, yesterday, url=url, lake=lake)
    with psycopg.connect(url) as connection:
        register_vector(connection)
        for version in versions:
            manifest = Manifest.from_json((artifacts / "models" / "ranker" / version / MANIFEST_FILE).read_text())
            registry.register(connection, manifest, f"models/ranker/{version}")
            registry.record_gate(connection, version, True, {})
            connection.execute(
                f"CREATE TABLE item_vectors_{version} PARTITION OF item_vectors FOR VALUES IN ('{version}')"
            )
            vectors = np.random.default_rng(manifest.seed).standard_normal((len(ITEMS), manifest.dim))
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            connection.cursor().executemany(
                "INSERT INTO item_vectors (model_version, item_id, vector, text_hash) VALUES (%s, %s, %s, 'h')",
                [(version, item, HalfVector(vector)) for item, vector in zip(ITEMS, vectors, strict=True)],
            )
        connection.cursor().executemany(
            "INSERT INTO popular_items (list, rank, item_id, score) VALUES (%s, %s, %s, %s)",
            [(name, row, item, 1.0) for name in ("trending", "fresh") for row, item in enumerate(ITEMS, start=1)],
        )
        connection.cursor().executemany(
            "INSERT INTO co_visitation (item_id, rank, neighbour_id, score, people) VALUES (%s, %s, %s, %s, 2)",
            [(item, n, ITEMS[(row + n) % len(ITEMS)], 1.0 / n) for row, item in enumerate(ITEMS) for n in (1, 2, 3)],
        )
