"""A whole deployment to ask, without training: a small catalogue in a real database, a ranker with random weights released."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import torch

from inference import artifacts
from inference.encoder import TextEncoder
from inference.runtime import LarderApplication
from inference.settings import Settings
from infra import registry
from orchestration.compute.artifact import describe_file
from orchestration.compute.encoder import export_encoder
from orchestration.compute.export import cut, export_fp32, quantise, random_inputs
from orchestration.compute.folded import fold
from orchestration.compute.ingest import ingest
from orchestration.compute.interactions import load_interactions
from orchestration.compute.lake import Lake
from orchestration.compute.lists import refresh_co_visitation, refresh_popular_items
from orchestration.compute.materialise import materialise
from orchestration.compute.vectors import refresh_item_vectors, refresh_text_vectors
from orchestration.sources.open import open_source
from schemas import prompts
from schemas.manifest import (
    CHAMPION_POINTER,
    ENCODER_PATH,
    ITEM_RESIDUALS,
    MANIFEST_FILE,
    POPULAR_ITEMS,
    RANKER_FP32,
    RANKER_INT8,
    RANKER_INT8_PARTS,
    TEXT_PROJECTION,
    Manifest,
)
from schemas.ranker import SIZES, TEXT_DIM
from schemas.views import VIEWS, candidate_features, context_features, fingerprint
from tests.rankers import random_ranker
from tests.worlds import serving

DAYS = 40
TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


@dataclass(frozen=True)
class ServedWorld:
    """Where it lies, and who is in it."""

    url: str
    artifacts_url: str
    version: str
    people: list[str]
    items: list[str]

    def settings(self, **more: Any) -> Settings:
        # Deadlines are other tests' subject: here the machine may be as slow as it likes.
        return serving(self.url, self.artifacts_url, timeout_ms=30_000, **more)

    def application(self, **more: Any) -> LarderApplication:
        """The real application, warm."""
        made = LarderApplication.from_settings(self.settings(**more))
        made.warm()
        return made


def build(url: str, folder: Path, *, people: int = 40, items: int = 120, size: str = "small") -> ServedWorld:
    """Fill the migrated, empty database at `url`; lake, encoder and artefact go below `folder`."""
    lake = Lake((folder / "lake").as_uri())
    home = folder / "artifacts"
    start = (TODAY - timedelta(days=DAYS)).date()
    world = f"simulated?people={people}&items={items}&days={DAYS}&events_per_person=20"
    export_encoder(home / ENCODER_PATH)
    encoder = TextEncoder(home / ENCODER_PATH)
    with psycopg.connect(url, options="-c TimeZone=UTC") as connection:
        ingest(open_source(world, start=start, until=TODAY), lake, connection)
        connection.commit()
        refresh_text_vectors(connection, encoder)
        interactions = load_interactions(lake, connection)
        refresh_co_visitation(connection, interactions)
        refresh_popular_items(connection, interactions, datetime.now(UTC))
        connection.commit()
    yesterday = (TODAY - timedelta(days=1)).date()
    for view in VIEWS:
        materialise(view, yesterday, yesterday, url=url, lake=lake)
    with psycopg.connect(url, options="-c TimeZone=UTC") as connection:
        manifest, artifact = random_artifact(connection, home, encoder, size)
        registry.register(connection, manifest, f"models/ranker/{manifest.version}")
        registry.record_gate(connection, manifest.version, True, {"words": ["random weights"]})
        refresh_item_vectors(connection, artifact, encoder)
        registry.promote(connection, manifest.version)
        connection.commit()
        who = [row[0] for row in connection.execute("SELECT DISTINCT user_id FROM user_history ORDER BY 1")]
        what = [row[0] for row in connection.execute("SELECT item_id FROM items ORDER BY 1")]
    pointer = {"version": manifest.version, "path": f"models/ranker/{manifest.version}"}
    artifacts.put(home.as_uri(), CHAMPION_POINTER, json.dumps(pointer).encode())
    return ServedWorld(url, home.as_uri(), manifest.version, who, what)


def random_artifact(
    connection: psycopg.Connection, home: Path, encoder: TextEncoder, size: str
) -> tuple[Manifest, Path]:
    """An artefact of random weights in its final place."""
    f, g, d = len(context_features()), len(candidate_features()), SIZES[size].dim
    place = home / "models" / "ranker" / "unfinished"
    place.mkdir(parents=True)
    torch.set_num_threads(1)
    export_fp32(fold(random_ranker(size, f, g)), place / RANKER_FP32, f=f, g=g, d=d)
    quantise(
        place / RANKER_FP32, place / RANKER_INT8, [random_inputs(1, 9, 16, f=f, g=g, d=d, seed=n) for n in range(8)]
    )
    cut(place / RANKER_INT8, *(place / name for name in RANKER_INT8_PARTS))
    weight = np.random.default_rng(0).normal(size=(d, TEXT_DIM)).astype(np.float32)
    np.savez(place / TEXT_PROJECTION, weight=weight, bias=np.zeros(d, np.float32))
    np.savez(place / ITEM_RESIDUALS, item_ids=np.array([], np.str_), residuals=np.zeros((0, d), np.float32))
    popular = connection.execute(
        "SELECT p.item_id, i.title, p.score, i.categories, i.attributes FROM popular_items AS p JOIN items AS i USING (item_id) "
        "WHERE p.list = 'trending' ORDER BY p.rank"
    )
    rows = [
        {"item_id": item_id, "title": title, "score": score, "categories": categories, "attributes": attributes}
        for item_id, title, score, categories, attributes in popular
    ]
    (place / POPULAR_ITEMS).write_text(json.dumps(rows))
    manifest = Manifest(
        name="ranker",
        size=size,
        dim=d,
        feature_fingerprint=fingerprint(),
        context_features=context_features(),
        candidate_features=candidate_features(),
        encoder_version=encoder.version,
        item_template=prompts.DEFAULTS["item"],
        wish_template=prompts.DEFAULTS["wish"],
        trained_until=(TODAY - timedelta(days=1)).isoformat(),
        seed=0,
        files={file.name: describe_file(file) for file in place.iterdir()},
        wish_weight=1.0,
    )
    (place / MANIFEST_FILE).write_text(manifest.to_json())
    return manifest, place.rename(place.parent / manifest.version)
