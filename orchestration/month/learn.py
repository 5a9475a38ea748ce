"""Training and release, by the functions that the assets call."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from inference import artifacts
from inference.encoder import TextEncoder
from infra import registry
from orchestration.compute.learn import evaluate_ranker, export_ranker, train_ranker
from orchestration.compute.telling import Say, silent
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.training_set import build_training_set
from orchestration.compute.vectors import refresh_item_vectors
from orchestration.month.place import Place
from orchestration.month.plan import Plan
from orchestration.month.story import Learned
from schemas.manifest import CHAMPION_POINTER


def learn(place: Place, plan: Plan, day: int, encoder: TextEncoder, say: Say) -> Learned:
    """Train on everything that is known, judge, export, and release what passes its gate; what does not stays on the shelf."""
    start = time.monotonic()
    config = TrainConfig(
        size=plan.size,
        seed=plan.seed,
        epochs=plan.epochs,
        slate_rows=plan.slate_rows,
        validation_labels=plan.validation_labels,
    )
    with place.connect() as connection, tempfile.TemporaryDirectory(prefix="larder-month-") as scratch:
        labels = build_training_set(place.lake, connection, place.artifacts_url)
        connection.commit()
        say(f"training on what is known: {labels.labels:,} labels of {labels.people:,} people")
        train_ranker(
            place.lake,
            connection,
            place.artifacts_url,
            Path(scratch) / "training",
            config=config,
            progress=say,
        )
        connection.commit()
        say("judging it against counts, neighbours and matrix factorisation")
        evaluate_ranker(place.lake, connection, place.artifacts_url, progress=silent, most=plan.judged)
        say("exporting it, and comparing the exported graphs with it")
        folder = Path(scratch) / "ranker"
        exported = export_ranker(place.lake, connection, place.artifacts_url, folder)
        version = exported.manifest.version
        path = f"models/ranker/{version}"
        artifacts.publish(place.artifacts_url, path, folder)
        registry.register(connection, exported.manifest, path)
        registry.record_gate(connection, version, exported.passed, exported.record)
        refresh_item_vectors(connection, place.artifacts / path, encoder)
        if exported.passed:
            registry.promote(connection, version)
            connection.commit()
            artifacts.put(
                place.artifacts_url, CHAMPION_POINTER, json.dumps({"version": version, "path": path}).encode()
            )
    for line in exported.words:
        say(line)
    return Learned(day, version, exported.passed, tuple(exported.words), time.monotonic() - start)
