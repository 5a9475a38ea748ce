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
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import torch

from inference import artifacts
from inference.encoder import TextEncoder
from orchestration.compute import learning_steps
from orchestration.compute.artifact import ArtifactLabels, write_artifact
from orchestration.compute.baselines import FLOORS, floors
from orchestration.compute.candidate_recall import candidate_recall, sources_of
from orchestration.compute.co_visitation import WindowedPopularity, co_visitation, popularity
from orchestration.compute.evaluate import (
    Scorer,
    evaluate,
    score_co_visitation,
    score_windowed_popularity,
)
from orchestration.compute.evaluation_report import Report, report
from orchestration.compute.impressions import load_passed_over
from orchestration.compute.lake import Lake
from orchestration.compute.mining import newest_labels
from orchestration.compute.point_in_time import PointInTime
from orchestration.compute.prompt_following import UNMEASURED_WEIGHT, PromptFollowing, measure_following
from orchestration.compute.prompt_records import PromptVersions, read_versions
from orchestration.compute.slates import Slates
from orchestration.compute.splits import Queries, Split, time_split
from orchestration.compute.telling import Say, silent
from orchestration.compute.train import train
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.trained_ranker import Progress, TrainedRanker
from orchestration.compute.training_set import learning_split, load_categories, load_training_set
from orchestration.compute.vectors import load_text_vectors, text_vectors_as, written_by
from orchestration.compute.wish_texts import wishes_for
from schemas.errors import DefinitionError, LarderError
from schemas.manifest import ENCODER_PATH, Manifest
from schemas.views import candidate_features, context_features, fingerprint

TRAINED_PATH = "training/ranker.pt"
TIME_SPLIT_PATH = "training/time_split.pt"
EVALUATION_PATH = "training/evaluation.json"
CHECKPOINTS = ("ranker.ckpt", "time_split.ckpt")
RANKER = "ranker"
FLOOR = FLOORS
"""Rows that the ranker must beat, every one of them, to serve."""
RERANKED = 200
"""Candidates an evaluation re-ranks per label."""
JUDGED_LABELS = 4_000
"""Labels of a split that are judged at most, chosen by seed: re-ranking each takes features of 200 items. So many say
where a lead lies to within 0.006, about a tenth of the NDCG@10 that is judged."""


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a training run did."""

    progress: list[Progress]
    validation: dict[str, float]
    events: int
    seconds: float
    prompts: PromptVersions


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Leave-one-out first, then the time split; how wishes are followed, None where none could be made up."""

    reports: tuple[Report, Report]
    following: PromptFollowing | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Exported:
    """An artefact, the version of the training set it comes from and its verdict; `words` say it for people."""

    manifest: Manifest
    training_set: str
    passed: bool
    record: dict[str, Any]
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Learned:
    """A trained ranker with what decided the texts it learned from: they go together ever after."""

    ranker: TrainedRanker
    prompts: PromptVersions
    encoder_version: str


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
    versions = read_versions(connection)
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
            versions,
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
            checkpoint = scratch / CHECKPOINTS[0]
            learned = _train(connection, artifacts_url, known.split, slates, checkpoint, config, versions, progress)
        _save(learned, artifacts_url, TRAINED_PATH)
        if twin.is_alive():
            progress("waiting for its twin, which learns from what was there before the cut of the time split")
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
    trained = learned.ranker
    return TrainingReport(trained.progress, trained.validation, len(known.split.train), trained.seconds, versions)


def train_time_split(
    lake_url: str,
    dsn: str,
    password: str,
    artifacts_url: str,
    scratch: Path,
    config: TrainConfig,
    known_until: datetime | None,
    versions: PromptVersions,
) -> None:
    """Train the twin that knows only the first 90 % of the events, in a process of its own."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    lake = Lake(lake_url)
    with psycopg.connect(dsn, password=password or None) as connection:
        later = time_split(learning_split(lake, connection, known_until).queries.interactions)
        with PointInTime(lake, connection) as ask:
            slates = Slates(ask, later.train, load_categories(connection, later.train))
            checkpoint = scratch / CHECKPOINTS[1]
            learned = _train(connection, artifacts_url, later, slates, checkpoint, config, versions, silent)
    _save(learned, artifacts_url, TIME_SPLIT_PATH)


def evaluate_ranker(
    lake: Lake, connection: psycopg.Connection[Any], artifacts_url: str, *, progress: Say, most: int | None = None
) -> EvaluationReport:
    """Judge the trained ranker on its held-out events, and its twin on the events after the cut of the time split.

    `most` labels of each split at most, chosen by seed; None: all held-out events, and `JUDGED_LABELS` of the time split.
    """
    start = time.monotonic()
    known = load_training_set(lake, connection, artifacts_url)
    split = known.split
    everything = split.queries.interactions
    categories = load_categories(connection, everything)
    later = time_split(everything)
    later = _judged(later, JUDGED_LABELS if most is None else most)
    split = split if most is None else _judged(split, most)
    learned = load_learned(artifacts_url, TRAINED_PATH)
    encoders = artifacts.fetch(artifacts_url, ENCODER_PATH)
    item_encoder = TextEncoder(encoders, precision="fp32")
    if item_encoder.version != learned.encoder_version:
        raise DefinitionError(
            f"the ranker learned from texts encoded by {learned.encoder_version}, the encoder is now {item_encoder.version}; "
            "train again (make run RETRAIN=1)"
        )
    # As it learned them, also where another template has won since.
    texts = text_vectors_as(connection, everything.item_ids, learned.prompts.item, item_encoder)
    wishes = wishes_for(connection, split.train, TextEncoder(encoders, precision="int8"), learned.prompts)
    reports = []
    with PointInTime(lake, connection) as ask:
        for judged, path in ((split, TRAINED_PATH), (later, TIME_SPLIT_PATH)):
            progress(
                f"{judged.name}: {len(judged.queries):,} labels, ranked by counts, neighbours, factors and the ranker"
            )
            rows, trained = floors(judged), load_learned(artifacts_url, path).ranker
            # Re-ranked is what serving re-ranks: neighbours of the user vector, what is trending, what follows.
            ranker = trained.scorer(
                Slates(ask, judged.queries.interactions, categories),
                rerank=min(RERANKED, len(everything.item_ids)),
                sources=(rows["7-day popularity"], rows["co-visitation"]),
            )
            reports.append(
                report(
                    evaluate({**rows, RANKER: ranker}, judged),
                    judged,
                    RANKER,
                    text_vectors=texts,
                    item_genres=wishes.item_categories,
                    calibration=trained.calibration,
                    candidates=candidate_recall(judged, sources_of(judged, similarity=replace(ranker, rerank=0))),
                )
            )
            progress(reports[-1].evaluation.table())
            progress(_in_a_line(reports[-1]))
        progress("how wishes are followed")
        validation = newest_labels(split.train, learned.ranker.config)
        following = measure_following(
            learned.ranker,
            validation,
            Slates(ask, split.train, categories),
            wishes,
            texts,
            _sources_without(validation),
            rerank=min(RERANKED, len(everything.item_ids)),
        )
    if following is not None:
        progress(following.words())
    first, second = reports
    record = {
        "leave_one_out": first.to_dict(),
        "time_split": second.to_dict(),
        "prompt_following": None if following is None else asdict(following),
    }
    artifacts.put(artifacts_url, EVALUATION_PATH, json.dumps(record).encode())
    learning_steps.done(artifacts_url, known.version, "ranker_evaluation")
    return EvaluationReport((first, second), following, time.monotonic() - start)


def _judged(split: Split, most: int) -> Split:
    """The split with at most so many of its labels."""
    chosen = np.random.default_rng(0).permutation(len(split.queries))[:most]
    return Split(split.name, split.train, split.queries.take(np.sort(chosen)))


def export_ranker(
    lake: Lake, connection: psycopg.Connection[Any], artifacts_url: str, folder: Path, *, progress: Say = silent
) -> Exported:
    """Export, quantise and gate the trained ranker into `folder`. Raises GateError if a graph is not what was trained."""
    known = load_training_set(lake, connection, artifacts_url)
    split = known.split
    learned = load_learned(artifacts_url, TRAINED_PATH)
    evaluation = json.loads(artifacts.get(artifacts_url, EVALUATION_PATH))
    following = evaluation["prompt_following"]
    passed, words = verdict(evaluation)
    popular = [
        {"item_id": item_id, "title": title, "score": score, "categories": categories, "attributes": attributes}
        for item_id, title, score, categories, attributes in connection.execute(
            "SELECT p.item_id, i.title, p.score, i.categories, i.attributes FROM popular_items AS p JOIN items AS i USING (item_id) "
            "WHERE p.list = 'trending' ORDER BY p.rank"
        )
    ]
    everything = split.queries.interactions
    labels = ArtifactLabels(
        feature_fingerprint=fingerprint(),
        context_features=context_features(),
        candidate_features=candidate_features(),
        encoder_version=learned.encoder_version,
        item_template=learned.prompts.item,
        profile_template=learned.prompts.profile,
        wish_template=learned.prompts.wish,
        wish_weight=UNMEASURED_WEIGHT if following is None else following["wish_weight"],
        trained_until=datetime.fromtimestamp(int(everything.occurred_at.max()) / 1e6, UTC).isoformat(),
    )
    requests = split.queries.take(np.sort(np.random.default_rng(1).permutation(len(split.queries))[:1024]))
    with PointInTime(lake, connection) as ask:
        manifest = write_artifact(
            learned.ranker,
            folder,
            labels,
            item_ids=everything.item_ids,
            popular_items=popular,
            requests=requests,
            quality=evaluation | {"verdict": {"passed": passed, "words": words}},
            slates=Slates(ask, everything, load_categories(connection, everything)),
            progress=progress,
        )
    if refused := manifest.parity["int8"]["refused"]:
        words = (*words, f"{refused}: the float graph takes its place")
    record = {
        "evaluation": evaluation,
        "parity": manifest.parity,
        "latency_ms": manifest.latency_ms,
        "size_bytes": {name: entry.size_bytes for name, entry in manifest.files.items()},
        "wish_weight": manifest.wish_weight,
        "words": words,
    }
    return Exported(manifest, known.version, passed, record, words)


def verdict(evaluation: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether the ranker beats every floor on both splits (NDCG@10), and that in words.

    What decides is the figure itself: it must lie above every floor's. Whether it does so beyond chance, by the paired
    interval over people, is said beside it. Raises KeyError if a floor was not evaluated.
    """
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
            f"{_beyond_chance(evaluation[key]['gains'][best], beats)}"
        )
    words.append("the ranker may serve" if passed else "the ranker stays on the shelf; the floor keeps serving")
    return passed, tuple(words)


def _beyond_chance(found: dict[str, float], beats: bool) -> str:
    """The paired gain in words."""
    figures = f"{found['mean']:+.4f}, 95 % {found['low']:+.4f} to {found['high']:+.4f}"
    if beats:
        return f" ({figures}{'' if found['low'] > 0 else ': not beyond chance'})"
    return f" ({figures}{': worse beyond chance' if found['high'] < 0 else ''})"


def _in_a_line(found: Report) -> str:
    """What lists and candidates are like, beside the table."""
    lists = found.beyond_accuracy[RANKER]
    told = f"ranker's lists: {lists.coverage_rate:.0%} of the catalogue shown, {lists.novelty_bits:.1f} bits of novelty"
    if found.candidates is not None:
        told += f"; {found.candidates.union:.1%} of labels among {found.candidates.candidates_mean:.0f} candidates"
    return told


def _sources_without(labels: Queries) -> tuple[Scorer, Scorer]:
    """What is trending and what people went on to, from a table less the labels that are to be found."""
    keep = np.ones(len(labels.interactions), bool)
    keep[labels.label] = False
    known = labels.interactions.take(keep)
    counts = popularity(known)
    return score_windowed_popularity(WindowedPopularity(known)), score_co_visitation(co_visitation(known), counts)


def _train(
    connection: psycopg.Connection[Any],
    artifacts_url: str,
    split: Split,
    slates: Slates,
    checkpoint: Path,
    config: TrainConfig,
    versions: PromptVersions,
    progress: Say,
) -> Learned:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)

    def tell(entry: Progress) -> None:
        quality = f", validation NDCG@10 {entry.ndcg_at_10:.4f}" if entry.ndcg_at_10 is not None else ""
        progress(
            f"stage {entry.stage}, epoch {entry.epoch} of {entry.epochs}: loss {entry.loss:.3f}{quality}, {entry.seconds:.0f} s"
        )

    encoder = TextEncoder(artifacts.fetch(artifacts_url, ENCODER_PATH), precision="int8")
    trained = train(
        split.train,
        load_text_vectors(connection, split.train.item_ids, written_by(versions.item, encoder.version)),
        config,
        features=slates,
        wishes=wishes_for(connection, split.train, encoder, versions),
        on_progress=tell,
        say=progress,
        checkpoint=checkpoint,
        passed_over=load_passed_over(connection, split.train),
    )
    return Learned(trained, versions, encoder.version)


def _save(learned: Learned, artifacts_url: str, path: str) -> None:
    buffer = io.BytesIO()
    torch.save(learned, buffer)
    artifacts.put(artifacts_url, path, buffer.getvalue())


def load_learned(artifacts_url: str, path: str = TRAINED_PATH) -> Learned:
    """What a training left at `path`. Raises DefinitionError if another version of this code wrote it."""
    # Our own file under our own artefacts' root, never one from a request.
    learned = torch.load(io.BytesIO(artifacts.get(artifacts_url, path)), weights_only=False)
    if not isinstance(learned, Learned):
        raise DefinitionError(f"{path} was trained by another version of this code; train again (make run RETRAIN=1)")
    return learned
