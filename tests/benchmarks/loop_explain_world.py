"""A trained deployment to explain: the simulator's world in a database, a `standard` ranker trained on it, int8, released.

It is built by the product's own road and kept in a folder, database and all, so that a second run measures at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import psycopg
import torch

from inference import artifacts
from inference.encoder import TextEncoder
from inference.runtime import LarderApplication
from inference.settings import Settings
from infra import postgres, registry, roles
from infra.feature_tables import ensure_view_tables
from orchestration.compute.artifact import ArtifactLabels, write_artifact
from orchestration.compute.encoder import export_encoder
from orchestration.compute.ingest import ingest
from orchestration.compute.interactions import load_interactions
from orchestration.compute.lake import Lake
from orchestration.compute.lists import refresh_co_visitation, refresh_popular_items
from orchestration.compute.materialise import materialise
from orchestration.compute.point_in_time import PointInTime
from orchestration.compute.prompt_records import PromptVersions
from orchestration.compute.slates import Slates
from orchestration.compute.splits import leave_one_out
from orchestration.compute.train import train
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.training_set import load_categories
from orchestration.compute.vectors import load_text_vectors, refresh_item_vectors, refresh_text_vectors, written_by
from orchestration.compute.wish_texts import wishes_for
from orchestration.sources.open import open_source
from schemas.manifest import CHAMPION_POINTER, ENCODER_PATH
from schemas.views import VIEWS, candidate_features, context_features, fingerprint
from tests.benchmarks.frame import note


@dataclass(frozen=True, slots=True)
class Size:
    """How large the world is, and how long its ranker is trained."""

    people: int = 800
    items: int = 600
    days: int = 90
    events_per_person: int = 45
    size: str = "standard"
    epochs: int = 10
    slate_rows: int = 4_000

    @property
    def source(self) -> str:
        return (
            f"simulated?people={self.people}&items={self.items}&days={self.days}"
            f"&events_per_person={self.events_per_person}"
        )


QUICK = Size(people=150, items=120, days=40, events_per_person=25, size="small", epochs=3, slate_rows=200)


@dataclass(frozen=True, slots=True)
class Trained:
    """The deployment: its database, where its artefacts lie, who is in it, and how well its ranker validates."""

    url: str
    artifacts_url: str
    lake_url: str
    version: str
    people: list[str]
    validation_ndcg_at_10: float
    until: str

    def application(self, **more: object) -> LarderApplication:
        """The real application over it, warm."""
        reader, writer = roles.serving_urls(self.url)
        settings = Settings(reader, self.artifacts_url, writer_url=writer, timeout_ms=30_000, audit_per_mille=0, **more)  # type: ignore[arg-type]
        made = LarderApplication.from_settings(settings)
        made.warm()
        return made


def trained(folder: Path, size: Size) -> Trained:
    """The deployment in `folder`, built on first use; its server is started."""
    url = postgres.start_embedded(folder / "postgres")
    record = folder / "trained.json"
    today = datetime.now(UTC).date().isoformat()
    if record.exists():
        held = json.loads(record.read_text())
        # Features and recent events are as of a day: yesterday's world is built again.
        if held["size"] == asdict(size) and held["until"] == today:
            return Trained(**{**held["trained"], "url": url})
    postgres.migrate(url)
    ensure_view_tables(url)
    made = _build(url, folder, size, today)
    record.write_text(json.dumps({"size": asdict(size), "until": today, "trained": asdict(made)}))
    return made


def _build(url: str, folder: Path, size: Size, today: str) -> Trained:
    lake = Lake((folder / "lake").as_uri())
    home = folder / "artifacts"
    until = datetime.fromisoformat(today).replace(tzinfo=UTC)
    start: date = (until - timedelta(days=size.days)).date()
    export_encoder(home / ENCODER_PATH)
    encoder = TextEncoder(home / ENCODER_PATH)
    with psycopg.connect(url, options="-c TimeZone=UTC") as connection:
        ingest(open_source(size.source, start=start, until=until), lake, connection)
        connection.commit()
        refresh_text_vectors(connection, encoder)
        interactions = load_interactions(lake, connection)
        refresh_co_visitation(connection, interactions)
        refresh_popular_items(connection, interactions, datetime.now(UTC))
        connection.commit()
    yesterday = (until - timedelta(days=1)).date()
    for view in VIEWS:
        materialise(view, yesterday, yesterday, url=url, lake=lake)
    torch.set_num_threads(1)
    with psycopg.connect(url, options="-c TimeZone=UTC") as connection, PointInTime(lake, connection) as ask:
        split = leave_one_out(interactions)
        versions = PromptVersions()
        slates = Slates(ask, split.train, load_categories(connection, split.train))
        note(f"training on {len(split.train):,} events")
        model = train(
            split.train,
            load_text_vectors(connection, split.train.item_ids, written_by(versions.item, encoder.version)),
            TrainConfig(size=size.size, epochs=size.epochs, slate_rows=size.slate_rows, validation_labels=300),
            features=slates,
            checkpoint=folder / "ranker.ckpt",
            wishes=wishes_for(connection, split.train, TextEncoder(home / ENCODER_PATH, precision="int8"), versions),
            on_progress=lambda entry: note(
                f"stage {entry.stage}, epoch {entry.epoch}: loss {entry.loss:.3f}, NDCG@10 {entry.ndcg_at_10}, "
                f"{entry.seconds:.0f} s"
            ),
        )
        popular = connection.execute(
            "SELECT p.item_id, i.title, p.score, i.categories, i.attributes FROM popular_items AS p JOIN items AS i USING (item_id) "
            "WHERE p.list = 'trending' ORDER BY p.rank"
        ).fetchall()
        unfinished = home / "models" / "ranker" / "unfinished"
        manifest = write_artifact(
            model,
            unfinished,
            ArtifactLabels(
                feature_fingerprint=fingerprint(),
                context_features=context_features(),
                candidate_features=candidate_features(),
                encoder_version=encoder.version,
                item_template=versions.item,
                wish_template=versions.wish,
                profile_template=versions.profile,
                wish_weight=4.0,
                trained_until=until.isoformat(),
            ),
            item_ids=interactions.item_ids,
            popular_items=[
                {"item_id": item, "title": title, "score": score, "categories": categories, "attributes": attributes}
                for item, title, score, categories, attributes in popular
            ],
            requests=split.queries.take(slice(0, 500)),
            slates=Slates(ask, split.queries.interactions, load_categories(connection, split.queries.interactions)),
        )
        note(f"int8: {manifest.parity['int8']}")
        path = f"models/ranker/{manifest.version}"
        place = unfinished.rename(home / path)
        registry.register(connection, manifest, path)
        registry.record_gate(connection, manifest.version, True, {"words": ["for the bench of explanations"]})
        refresh_item_vectors(connection, place, encoder)
        registry.promote(connection, manifest.version)
        connection.commit()
        # Long enough a history that there is something to remove.
        people = connection.execute(
            "SELECT user_id FROM user_history GROUP BY user_id HAVING count(*) >= 5 ORDER BY user_id"
        ).fetchall()
    artifacts.put(home.as_uri(), CHAMPION_POINTER, json.dumps({"version": manifest.version, "path": path}).encode())
    return Trained(
        url,
        home.as_uri(),
        lake.url,
        manifest.version,
        [row[0] for row in people],
        float(model.validation.get("ndcg_at_10", float("nan"))),
        today,
    )
