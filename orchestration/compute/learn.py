"""From the training set to a judged, exported model: what the ranker's assets call, in order.

    training set ─▶ train_ranker ─▶ evaluate_ranker ─▶ export_ranker (gate record)

Between the steps the trained model and the evaluation lie under `training/` of the artefacts, and with them how far the
training set at hand has come (orchestration/compute/learning_steps.py).
"""

from __future__ import annotations

import io
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import torch

from inference import artifacts
from inference.encoder import TextEncoder
from orchestration.compute import co_visitation as floor
from orchestration.compute import learning_steps
from orchestration.compute.artifact import ArtifactLabels, write_artifact
from orchestration.compute.evaluate import (
    Evaluation,
    Scorer,
    evaluate,
    score_co_visitation,
    score_popularity,
    score_windowed_popularity,
)
from orchestration.compute.interactions import Interactions
from orchestration.compute.lake import Lake
from orchestration.compute.point_in_time import PointInTime
from orchestration.compute.slates import Slates
from orchestration.compute.splits import Split, time_split
from orchestration.compute.train import train
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.trained_ranker import Progress, TrainedRanker
from orchestration.compute.training_set import learning_split, load_categories, load_training_set
from orchestration.compute.vectors import load_text_vectors
from orchestration.compute.wishes import Wishes
from schemas import prompts
from schemas.errors import LarderError
from schemas.manifest import ENCODER_PATH, Manifest
from schemas.views import candidate_features, context_features, fingerprint

TRAINED_PATH = "training/ranker.pt"
TIME_SPLIT_PATH = "training/time_split.pt"
EVALUATION_PATH = "training/evaluation.json"
CHECKPOINTS = ("ranker.ckpt", "time_split.ckpt")
RANKER = "ranker"
FLOOR = ("popularity", "7-day popularity", "co-visitation")
RERANKED = 200
"""Candidates an evaluation re-ranks per label."""
JUDGED_LABELS = 2_000
"""Labels of a split that are judged at most, chosen by seed: re-ranking each takes features of 200 items."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a training run did."""

    progress: list[Progress]
    validation: dict[str, float]
    events: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Leave-one-out first, then the time split."""

    evaluations: tuple[Evaluation, Evaluation]
    seconds: float


@dataclass(frozen=True, slots=True)
class Exported:
    """An artefact, the version of the training set it comes from and its verdict; `words` say it for people."""

    manifest: Manifest
    training_set: str
    passed: bool
    record: dict[str, Any]
    words: tuple[str, ...]


def wishes_for(connection: psycopg.Connection[Any], artifacts_url: str, interactions: Interactions) -> Wishes:
    """Training wishes: each category as a person would say it, encoded like a wish in a request."""
    categories = load_categories(connection, interactions)
    names = sorted({name for names in categories for name in names})
    encoder = TextEncoder(artifacts.fetch(artifacts_url, ENCODER_PATH), precision="int8")
    template = prompts.load(prompts.WISH_TEMPLATE)
    vectors = encoder.encode([template.render({"wish": name}) for name in names])
    place = {name: index for index, name in enumerate(names)}
    member = np.zeros((len(categories), len(names)), bool)
    for item, held in enumerate(categories):
        member[item, [place[name] for name in held]] = True
    return Wishes(vectors, member)


def train_ranker(
    lake: Lake,
    connection: psycopg.Connection[Any],
    artifacts_url: str,
    scratch: Path,
    *,
    config: TrainConfig,
    progress: Say,
) -> TrainingReport:
    """Train the ranker on the training set, and its twin on the early part of a time split; keep both.

    Both run at once, a processor each: two threads on one training gain nothing at this size. An interrupted training
    goes on from its last epoch.
    """
    known = load_training_set(lake, connection, artifacts_url)
    twin = multiprocessing.get_context("spawn").Process(
        target=train_time_split,
        args=(
            lake.url,
            connection.info.dsn,
            connection.info.password,
            artifacts_url,
            scratch,
            config,
            known.known_until,
        ),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    twin.start()
    try:
        with PointInTime(lake, connection) as ask:
            slates = Slates(
                ask,
                known.split.train,
                load_categories(connection, known.split.train),
                (known.rows, known.context, known.context_mask),
            )
            trained = _train(connection, artifacts_url, known.split, slates, scratch / CHECKPOINTS[0], config, progress)
        _save(trained, artifacts_url, TRAINED_PATH)
        twin.join()
    finally:
        torch.set_num_threads(threads)
        if twin.is_alive():
            twin.terminate()
            twin.join()
    if twin.exitcode != 0:
        raise LarderError(f"training on the time split ended with status {twin.exitcode}; its error stands above")
    learning_steps.done(artifacts_url, known.version, "ranker")
    # Not before both are kept: an interruption between the two would have one of them trained again.
    for name in CHECKPOINTS:
        (scratch / name).unlink(missing_ok=True)
    return TrainingReport(trained.progress, trained.validation, len(known.split.train), trained.seconds)


def train_time_split(
    lake_url: str,
    dsn: str,
    password: str,
    artifacts_url: str,
    scratch: Path,
    config: TrainConfig,
    known_until: datetime | None,
) -> None:
    """Train the twin that knows only the first 90 % of the events, in a process of its own."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    lake = Lake(lake_url)
    with psycopg.connect(dsn, password=password or None) as connection:
        later = time_split(learning_split(lake, connection, known_until).queries.interactions)
        with PointInTime(lake, connection) as ask:
            slates = Slates(ask, later.train, load_categories(connection, later.train))
            trained = _train(connection, artifacts_url, later, slates, scratch / CHECKPOINTS[1], config, lambda _: None)
    _save(trained, artifacts_url, TIME_SPLIT_PATH)


def evaluate_ranker(
    lake: Lake, connection: psycopg.Connection[Any], artifacts_url: str, *, progress: Say
) -> EvaluationReport:
    """Judge the trained ranker on its held-out events, and its twin on the events after the cut of the time split."""
    start = time.monotonic()
    known = load_training_set(lake, connection, artifacts_url)
    split = known.split
    everything = split.queries.interactions
    categories = load_categories(connection, everything)
    later = time_split(everything)
    chosen = np.random.default_rng(0).permutation(len(later.queries))[:JUDGED_LABELS]
    later = Split(later.name, later.train, later.queries.take(np.sort(chosen)))
    evaluations = []
    with PointInTime(lake, connection) as ask:
        for judged, path in ((split, TRAINED_PATH), (later, TIME_SPLIT_PATH)):
            floors = _floor(judged)
            # Re-ranked is what serving re-ranks: neighbours of the user vector, what is trending, what follows.
            ranker = _load_trained(artifacts_url, path).scorer(
                Slates(ask, judged.queries.interactions, categories),
                rerank=min(RERANKED, len(everything.item_ids)),
                sources=(floors["7-day popularity"], floors["co-visitation"]),
            )
            evaluations.append(evaluate({**floors, RANKER: ranker}, judged))
            progress(evaluations[-1].table())
    first, second = evaluations
    artifacts.put(
        artifacts_url,
        EVALUATION_PATH,
        json.dumps({"leave_one_out": first.to_dict(), "time_split": second.to_dict()}).encode(),
    )
    learning_steps.done(artifacts_url, known.version, "ranker_evaluation")
    return EvaluationReport((first, second), time.monotonic() - start)


def export_ranker(lake: Lake, connection: psycopg.Connection[Any], artifacts_url: str, folder: Path) -> Exported:
    """Export, quantise and gate the trained ranker into `folder`. Raises GateError if a graph is not what was trained."""
    known = load_training_set(lake, connection, artifacts_url)
    split = known.split
    trained = _load_trained(artifacts_url, TRAINED_PATH)
    evaluation = json.loads(artifacts.get(artifacts_url, EVALUATION_PATH))
    popular = [
        {"item_id": item_id, "title": title, "score": score}
        for item_id, title, score in connection.execute(
            "SELECT p.item_id, i.title, p.score FROM popular_items AS p JOIN items AS i USING (item_id) "
            "WHERE p.list = 'trending' ORDER BY p.rank"
        )
    ]
    everything = split.queries.interactions
    encoder = TextEncoder(artifacts.fetch(artifacts_url, ENCODER_PATH), precision="int8")
    labels = ArtifactLabels(
        feature_fingerprint=fingerprint(),
        context_features=context_features(),
        candidate_features=candidate_features(),
        encoder_version=encoder.version,
        item_template=prompts.ITEM_TEMPLATE,
        wish_template=prompts.WISH_TEMPLATE,
        trained_until=datetime.fromtimestamp(int(everything.occurred_at.max()) / 1e6, UTC).isoformat(),
    )
    requests = split.queries.take(np.sort(np.random.default_rng(1).permutation(len(split.queries))[:1024]))
    with PointInTime(lake, connection) as ask:
        manifest = write_artifact(
            trained,
            folder,
            labels,
            item_ids=everything.item_ids,
            popular_items=popular,
            requests=requests,
            quality=evaluation,
            slates=Slates(ask, everything, load_categories(connection, everything)),
        )
    passed, words = verdict(evaluation)
    if refused := manifest.parity["int8"]["refused"]:
        words = (*words, f"{refused}: the float graph takes its place")
    record = {"evaluation": evaluation, "parity": manifest.parity, "words": words}
    return Exported(manifest, known.version, passed, record, words)


def verdict(evaluation: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether the ranker beats every floor on both splits (NDCG@10), and that in words."""
    passed, words = True, []
    for key, name in (("leave_one_out", "leave-one-out"), ("time_split", "time split")):
        scores = {
            row["name"]: row["ndcg"]["10"] if "10" in row["ndcg"] else row["ndcg"][10]
            for row in evaluation[key]["rows"]
        }
        best = max(FLOOR, key=lambda row: scores[row])
        beats = scores[RANKER] > scores[best]
        passed &= beats
        words.append(
            f"{name}: ranker {scores[RANKER]:.4f} NDCG@10 {'beats' if beats else 'does not beat'} {best} {scores[best]:.4f}"
        )
    words.append("the ranker may serve" if passed else "the ranker stays on the shelf; the floor keeps serving")
    return passed, tuple(words)


def _train(
    connection: psycopg.Connection[Any],
    artifacts_url: str,
    split: Split,
    slates: Slates,
    checkpoint: Path,
    config: TrainConfig,
    progress: Say,
) -> TrainedRanker:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)

    def report(entry: Progress) -> None:
        quality = f", validation NDCG@10 {entry.ndcg_at_10:.4f}" if entry.ndcg_at_10 is not None else ""
        progress(
            f"stage {entry.stage}, epoch {entry.epoch} of {entry.epochs}: loss {entry.loss:.3f}{quality}, {entry.seconds:.0f} s"
        )

    return train(
        split.train,
        load_text_vectors(connection, split.train.item_ids),
        config,
        features=slates,
        wishes=wishes_for(connection, artifacts_url, split.train),
        on_progress=report,
        checkpoint=checkpoint,
    )


def _save(trained: TrainedRanker, artifacts_url: str, path: str) -> None:
    buffer = io.BytesIO()
    torch.save(trained, buffer)
    artifacts.put(artifacts_url, path, buffer.getvalue())


def _load_trained(artifacts_url: str, path: str) -> TrainedRanker:
    # Our own file under our own artefacts' root, never one from a request.
    trained: TrainedRanker = torch.load(io.BytesIO(artifacts.get(artifacts_url, path)), weights_only=False)
    return trained


def _floor(split: Split) -> dict[str, Scorer]:
    counts = floor.popularity(split.train)
    everything = split.queries.interactions
    return {
        "popularity": score_popularity(counts),
        # What was popular lately is public knowledge at the label's time; nothing is fitted.
        "7-day popularity": score_windowed_popularity(floor.WindowedPopularity(everything, days=7)),
        "co-visitation": score_co_visitation(floor.co_visitation(split.train), counts),
    }
