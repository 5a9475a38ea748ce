"""What is measured of the ranker, a function each: its numbers, its tables, and details for the dated file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infra import postgres
from orchestration.compute.baselines import floors
from orchestration.compute.beyond_accuracy import BeyondAccuracy, beyond_accuracy, beyond_accuracy_table
from orchestration.compute.candidate_recall import candidate_recall, sources_of
from orchestration.compute.cold import HISTORY_LENGTHS, cold_items, genre_lift, hide_items, shorten_histories
from orchestration.compute.evaluate import Evaluation, RankerScorer, aligned, evaluate, gain, interval, ranks
from orchestration.compute.export import calibration_requests, export_fp32, quantise, session_runner
from orchestration.compute.folded import fold
from orchestration.compute.parity import compare_int8
from orchestration.compute.point_in_time import PointInTime
from orchestration.compute.segments import segment_table
from orchestration.compute.slates import Slates
from orchestration.compute.splits import Queries, Split
from orchestration.compute.train import train
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.trained_ranker import Progress, TrainedRanker
from orchestration.compute.true_relevance import true_relevance
from orchestration.sources.simulator import Simulator
from schemas.ranker import TEXT_DIM
from tests.benchmarks import encoder_speed
from tests.benchmarks import ml1m as sequences_file
from tests.benchmarks.frame import elsewhere
from tests.benchmarks.ranker_speed import scoring
from tests.benchmarks.ranker_world import Dated, Sequences, Sizes, catalogue_of, dated, sequences

Say = Callable[[str], None]
Found = dict[str, Any]
RANKER, INT8 = "ranker", "ranker, int8"
RERANKED = 500
"""Candidates that are re-ranked, as in serving."""


@dataclass(frozen=True)
class Where:
    """`work` keeps models and vectors from run to run, `scratch` goes with this one."""

    work: Path
    scratch: Path


def found(numbers: dict[str, float], tables: list[str], **details: Any) -> Found:
    """A section's outcome as JSON keeps it."""
    return {"numbers": {key: float(value) for key, value in numbers.items()}, "tables": tables, "details": details}


def ml1m(where: Where, sizes: Sizes, say: Say) -> Found:
    """Leave-one-out on sequences: the ranker in float and in int8 against every floor."""
    world = sequences(sizes, where.work)
    split = judged(world.split, sizes)
    trained = trained_on_sequences(where, sizes, world, say)
    scorer = trained.scorer(rerank=RERANKED)
    say("int8")
    fp32, int8 = graphs(trained, scorer, calibrating(split, sizes), where.work / "onnx")
    say("judging")
    judgement = evaluate({**floors(split), RANKER: fp32, INT8: int8}, split, resamples=sizes.resamples)
    ahead = judgement.gain(RANKER, "co-visitation", resamples=sizes.resamples)
    some = split.queries.take(slice(0, sizes.requests))
    compared = compare_int8(fp32, int8, some)
    ours, theirs = judgement.row(RANKER), judgement.row("co-visitation")
    numbers = {
        "ml1m_ndcg_at_10": ours.ndcg[10],
        "ml1m_hr_at_10": ours.hr[10],
        "ml1m_train_seconds": trained.seconds,
        "ml1m_co_visitation_ndcg_at_10": theirs.ndcg[10],
        "ml1m_gain_ci_low": ahead.low,
        "int8_ndcg_loss_rate": 1 - judgement.row(INT8).ndcg[10] / ours.ndcg[10],
        "int8_top10_overlap": compared.top_10_overlap_rate,
        "batch_invariance_max_shift": compared.batch_shift_rate,
    }
    say("candidates")
    recalled = candidate_recall(split, sources_of(split, similarity=replace(fp32, rerank=0)))
    beyond = beyond_of(judgement, split, world.text_vectors, world.wishes.item_categories)
    tables = [judgement.table(), segment_table(ranks_of(judgement), split)]
    tables += [beyond_accuracy_table(beyond), recalled.table()]
    truth = true_relevance_of(judgement, split, world.simulator, sizes) if world.simulator else {}
    if truth:
        tables.append(truth_table(judgement, truth))
    return found(
        numbers,
        tables,
        evaluation=judgement.to_dict(RANKER),
        beyond_accuracy={name: asdict(row) for name, row in beyond.items()},
        candidates=asdict(recalled),
        true_relevance=truth,
        int8=asdict(compared),
        **about(trained),
    )


def ml100k(where: Where, sizes: Sizes, say: Say) -> Found:
    """The global time split of events with times, by the product's own road; with the gaps between events and without."""
    server = postgres.start_embedded(where.scratch / "postgres")
    with dated(sizes, server, where.scratch, where.work) as world:
        # A processor each: two threads on one training gain nothing at this size.
        with elsewhere() as other:
            twin = other.submit(train_dated, world, without_time(sizes.dated_config), where.work / "ml100k-no-time")
            trained = train_dated(world, sizes.dated_config, where.work / "ml100k", say)
            timeless = twin.result()
        rows = floors(world.split)
        sources = (rows["7-day popularity"], rows["co-visitation"])
        say("judging")
        with world.connect() as connection, PointInTime(world.lake, connection) as ask:
            slates = Slates(ask, world.split.queries.interactions, world.categories)
            for name, model in (("ranker without time", timeless), (RANKER, trained)):
                rows[name] = model.scorer(slates, rerank=RERANKED, sources=sources)
            split = world.split
            judgement = evaluate(rows, split, resamples=sizes.resamples)
            say("candidates")
            similarity = trained.scorer(slates, rerank=0)
            recalled = candidate_recall(split, sources_of(split, similarity=similarity))
            vectors = world.text_vectors(connection, split.train)
            genres = world.wishes(connection, split.train).item_categories
        beyond = beyond_of(judgement, split, vectors, genres)
    numbers = {
        "ml100k_time_split_ndcg_at_10": judgement.row(RANKER).ndcg[10],
        "ml100k_time_split_popularity_7d_ndcg_at_10": judgement.row("7-day popularity").ndcg[10],
        "ml100k_time_split_co_visitation_ndcg_at_10": judgement.row("co-visitation").ndcg[10],
        "ml100k_time_split_als_ndcg_at_10": judgement.row("ALS").ndcg[10],
        "ml100k_time_split_without_time_ndcg_at_10": judgement.row("ranker without time").ndcg[10],
        "ml100k_train_seconds": trained.seconds,
    }
    return found(
        numbers,
        [judgement.table(), segment_table(ranks_of(judgement), split), beyond_accuracy_table(beyond), recalled.table()],
        evaluation=judgement.to_dict(RANKER),
        beyond_accuracy={name: asdict(row) for name, row in beyond.items()},
        candidates=asdict(recalled),
        **about(trained),
    )


def cold(where: Where, sizes: Sizes, say: Say) -> Found:
    """A tenth of the items hidden from training: recall of those by their text, and how the checkpoint does on the others."""
    world = sequences(sizes, where.work)
    # Of what the leave-one-out test leaves: its labels then judge the same checkpoint on the items it knows.
    split = hide_items(world.split.train)
    trained = learn_sequences(where.work / "cold", replace(world, split=split), sizes, say)
    scorer = trained.scorer(rerank=RERANKED)
    say("judging")
    asked = judged(split, sizes).queries
    # What was hidden may be offered, and what nobody ever had; by the vectors alone, as candidates are found.
    found_cold = cold_items(scorer, asked, world.text_vectors)
    by_vector = cold_items(replace(scorer, rerank=0), asked, world.text_vectors)
    known = np.isin(world.split.queries.target, split.train.item)
    warm = judged(Split("leave-one-out, items not hidden", split.train, world.split.queries.take(known)), sizes)
    judgement = evaluate({**floors(warm), RANKER: scorer}, warm, resamples=sizes.resamples)
    numbers = {
        "cold_item_recall_ratio": found_cold.ratio,
        "cold_item_recall_ratio_low": found_cold.low,
        "cold_item_recall_at_50": found_cold.recall,
        "cold_item_recall_ratio_by_vector": by_vector.ratio,
        "cold_warm_ndcg_at_10": judgement.row(RANKER).ndcg[10],
        "cold_train_seconds": trained.seconds,
    }
    lines = [
        [f"{split.name}, {found_cold.labels} labels", f"recall@{found_cold.k}", f"{RANKER} / this"],
        *(
            [f"text, {name}", f"{recall:.4f}", f"{found_cold.recall / recall:.2f}" if recall else "–"]
            for name, recall in found_cold.text_recall.items()
        ),
        ["user vector alone", f"{by_vector.recall:.4f}", ""],
        [RANKER, f"{found_cold.recall:.4f}", f"{found_cold.low:.2f}–{found_cold.high:.2f}"],
    ]
    return found(
        numbers,
        [aligned(lines), judgement.table()],
        cold=asdict(found_cold),
        by_vector=asdict(by_vector),
        evaluation=judgement.to_dict(RANKER),
        **about(trained),
    )


def people(where: Where, sizes: Sizes, say: Say) -> Found:
    """The checkpoint of `ml1m` asked by new people: a wish and nothing else, then their first few events."""
    world = sequences(sizes, where.work)
    trained = trained_on_sequences(where, sizes, world, say)
    queries = judged(world.split, sizes).queries
    weight, bias = trained.text_projection()

    def with_wishes(texts: Callable[[Queries], NDArray[np.float32]]) -> RankerScorer:
        """A scorer whose wishes are text vectors `(q, 384)`, zero for none."""

        def wish(asked: Queries) -> NDArray[np.float32]:
            text = texts(asked)
            vector = text @ weight.T + bias
            vector /= np.maximum(np.linalg.norm(vector, axis=1, keepdims=True), 1e-9)
            return np.where(np.abs(text).sum(axis=1, keepdims=True) > 0, vector, 0).astype(np.float32)

        return replace(trained.scorer(rerank=RERANKED), wish_vectors=wish)

    def wishing(text: NDArray[np.float32] | None) -> RankerScorer:
        said = np.zeros(TEXT_DIM, np.float32) if text is None else text
        return with_wishes(lambda asked: np.broadcast_to(said, (len(asked), TEXT_DIM)))

    # Without history, features or anything seen every stranger's request is the same one.
    stranger = queries.take(slice(0, 1))
    stranger = replace(stranger, start=stranger.stop)
    lifts = genre_lift(wishing, stranger, world.wishes.category_vectors, world.wishes.item_categories, world.genres)
    say("few events")
    lines = [["NDCG@10 by events known", *(f"{events}" for events in HISTORY_LENGTHS), "all"]]
    by_events: dict[str, list[float]] = {}
    profile = with_wishes(lambda asked: profiles(world, asked))
    for name, scorer in (("without a wish", trained.scorer(rerank=RERANKED)), ("with their genres as a wish", profile)):
        asked = [shorten_histories(queries, events) for events in HISTORY_LENGTHS] + [queries]
        by_events[name] = [float(gain(ranks(scorer, one), 10).mean()) for one in asked]
        lines.append([name, *(f"{ndcg:.4f}" for ndcg in by_events[name])])
    numbers = {"prompt_genre_lift": lifts.lift} | {
        f"ndcg_at_10_of_{events}_events": ndcg
        for events, ndcg in zip(HISTORY_LENGTHS, by_events["without a wish"], strict=False)
    }
    return found(numbers, [lifts.table(), aligned(lines)], lifts=asdict(lifts), by_events=by_events)


def profiles(world: Sequences, asked: Queries) -> NDArray[np.float32]:
    """`(q, 384)`: each person's wish, made of the two genres that their whole history has most beyond the catalogue's share.

    What was cut off of a history counts: the profile is what a new person tells of themselves; the label is no part of it.
    """
    member = world.wishes.item_categories.astype(np.float32)
    share = member.mean(axis=0)
    start = asked.start if asked.seen_from is None else asked.seen_from
    texts = np.zeros((len(asked), TEXT_DIM), np.float32)
    for row, (begin, end) in enumerate(zip(start.tolist(), asked.stop.tolist(), strict=True)):
        if end > begin:
            beyond = member[asked.interactions.item[begin:end]].mean(axis=0) - share
            texts[row] = world.wishes.category_vectors[np.argsort(-beyond, kind="stable")[:2]].sum(axis=0)
    return texts / np.maximum(np.linalg.norm(texts, axis=1, keepdims=True), 1e-9)


def speed(where: Where, sizes: Sizes, say: Say) -> Found:
    """One request scored on two cores in int8, by size and number of candidates; random weights, as speed needs no others."""
    reports = {size: scoring(size, runs=sizes.runs) for size in ("small", "standard")}
    numbers: dict[str, float] = {"int8_size_bytes": reports["standard"]["int8_size_bytes"]}
    head = ["history of 100, p50 in ms", "int8, 500", "int8, 1,000", "1,000 / 500", "float, 500", "float, 1,000"]
    lines = [[*head, "int8 bytes", "shift, int8", "shift, float"]]
    for size, report in reports.items():
        numbers |= {f"score_{n}_{size}_p50_ms": report[f"int8_score_{n}_p50_ms"] for n in (500, 1000)}
        numbers[f"score_1000_over_500_{size}"] = report["int8_1000_over_500"]
        numbers[f"random_{size}_batch_shift"] = report["batch_invariance_max_shift"]
        timed = [f"{report[f'{kind}_p50_ms']:.2f}" for kind in ("int8_score_500", "int8_score_1000")]
        exact = [f"{report[f'{kind}_p50_ms']:.2f}" for kind in ("fp32_score_500", "fp32_score_1000")]
        shifts = [f"{report[name]:.1e}" for name in ("batch_invariance_max_shift", "fp32_batch_invariance_max_shift")]
        bytes_of = f"{report['int8_size_bytes']:,}"
        lines.append([size, *timed, f"{report['int8_1000_over_500']:.2f}", *exact, bytes_of, *shifts])
    return found(numbers, [aligned(lines)], reports=reports)


def encoding(where: Where, sizes: Sizes, say: Say) -> Found:
    """Item texts in float and wishes in int8 against sentence-transformers, on the catalogue's own texts."""
    texts = catalogue_of(sizes).texts
    chosen = np.sort(np.random.default_rng(0).permutation(len(texts))[: sizes.texts])
    report = encoder_speed.encoding([texts[row] for row in chosen.tolist()], rounds=sizes.rounds)
    keys = ("encode_items_speedup", "encode_items_cosine", "encode_wish_speedup", "encode_wish_cosine")
    numbers = {key: report[key] for key in (*keys, "neighbours_overlap", "encode_items_per_s", "encode_wish_p50_ms")}
    lines = [[f"{report['texts']} texts, {report['wishes']} wishes", "times as fast", "cosine", "same ten nearest"]]
    lines.append(["items, float", f"{report[keys[0]]:.2f}", f"{report[keys[1]]:.6f}", ""])
    lines.append(
        ["wishes, int8", f"{report[keys[2]]:.2f}", f"{report[keys[3]]:.4f}", f"{report['neighbours_overlap']:.2f}"]
    )
    return found(numbers, [aligned(lines)], report=report)


def rectools(where: Where, sizes: Sizes, say: Say) -> Found:
    """RecTools' SASRec on the split of `ml1m` with the time that our checkpoint took, beside it."""
    from tests.benchmarks.rectools_peer import NAME, measure

    world = sequences(sizes, where.work)
    split = judged(world.split, sizes)
    trained = trained_on_sequences(where, sizes, world, say)
    row, went = measure(
        split, trained.config.size, trained.seconds, trained.config.seed, where.scratch / "rectools", say
    )
    judgement = evaluate({RANKER: trained.scorer(rerank=RERANKED)}, split, resamples=sizes.resamples)
    judgement = replace(judgement, rows=(row, *judgement.rows))
    ahead = judgement.gain(RANKER, NAME, resamples=sizes.resamples)
    numbers = {
        "rectools_ml1m_ndcg_at_10": row.ndcg[10],
        "rectools_ml1m_hr_at_10": row.hr[10],
        "rectools_ml1m_train_seconds": went["train_seconds"],
        "rectools_ml1m_gain_ci_low": ahead.low,
    }
    return found(numbers, [judgement.table()], evaluation=judgement.to_dict(RANKER), training=went)


# ---- training


def trained_on_sequences(where: Where, sizes: Sizes, world: Sequences, say: Say) -> TrainedRanker:
    """The one checkpoint that the sections on sequences judge: trained on first use, kept in the work folder."""
    return learn_sequences(where.work / "ml1m", world, sizes, say)


def learn_sequences(file: Path, world: Sequences, sizes: Sizes, say: Say) -> TrainedRanker:
    """A model of the split's training events; some people's last ones but one say when it is good, the rest is learned."""
    labels = sequences_file.validation_labels(world.split.train)
    chosen = np.random.default_rng(0).permutation(len(labels))[: sizes.sequences_config.validation_labels]
    validation = labels.take(np.sort(chosen))
    return learn(
        file,
        say,
        lambda **more: train(
            world.split.train,
            world.text_vectors,
            sizes.sequences_config,
            wishes=world.wishes,
            validation=validation,
            **more,
        ),
    )


def train_dated(world: Dated, config: TrainConfig, file: Path, say: Say = lambda _: None) -> TrainedRanker:
    """A model of the events before the cut, with what was known at each label."""
    torch.set_num_threads(1)
    split = world.split
    with world.connect() as connection, PointInTime(world.lake, connection) as ask:
        return learn(
            file,
            say,
            lambda **more: train(
                split.train,
                world.text_vectors(connection, split.train),
                config,
                features=Slates(ask, split.train, world.categories),
                wishes=world.wishes(connection, split.train),
                **more,
            ),
        )


def learn(file: Path, say: Say, run: Callable[..., TrainedRanker]) -> TrainedRanker:
    """What `run` trains, kept as `file`.pt; interrupted, it goes on from its last epoch."""
    kept = file.with_suffix(".pt")
    if kept.exists():
        say(f"model taken from {kept}")
        trained: TrainedRanker = torch.load(kept, weights_only=False)  # our own file
        return trained

    def report(entry: Progress) -> None:
        quality = f", validation NDCG@10 {entry.ndcg_at_10:.4f}" if entry.ndcg_at_10 is not None else ""
        say(
            f"{file.name}: stage {entry.stage}, epoch {entry.epoch} of {entry.epochs}: loss {entry.loss:.3f}{quality}, {entry.seconds:.0f} s"
        )

    checkpoint = file.with_suffix(".ckpt")
    trained = run(on_progress=report, checkpoint=checkpoint)
    torch.save(trained, kept)
    checkpoint.unlink(missing_ok=True)
    return trained


def without_time(config: TrainConfig) -> TrainConfig:
    """The same settings blind to when things happened."""
    return replace(config, gaps=False)


def about(trained: TrainedRanker) -> dict[str, Any]:
    """How a model was trained."""
    return {
        "config": asdict(trained.config),
        "progress": [asdict(line) for line in trained.progress],
        "train_seconds": trained.seconds,
        "torch_threads": torch.get_num_threads(),
    }


# ---- judging


def judged(split: Split, sizes: Sizes) -> Split:
    """The split with at most `sizes.judged` of its labels, chosen by seed."""
    chosen = np.random.default_rng(0).permutation(len(split.queries))[: sizes.judged]
    return Split(split.name, split.train, split.queries.take(np.sort(chosen)))


def calibrating(split: Split, sizes: Sizes) -> Queries:
    """Requests from training for int8's ranges: nothing that is judged has been looked at."""
    labels = sequences_file.validation_labels(split.train)
    chosen = np.random.default_rng(1).permutation(len(labels))[: sizes.requests]
    return labels.take(np.sort(chosen))


def graphs(
    trained: TrainedRanker, scorer: RankerScorer, requests: Queries, folder: Path
) -> tuple[RankerScorer, RankerScorer]:
    """The model as it serves: its float graph and its int8 twin, calibrated on `requests`."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = trained.ranker.shape
    fp32, int8 = folder / "ranker.fp32.onnx", folder / "ranker.int8.onnx"
    export_fp32(
        fold(trained.ranker),
        fp32,
        f=shape.context_features,
        g=shape.candidate_features,
        d=trained.ranker.user.out_features,
    )
    exact = replace(scorer, run=session_runner(fp32))
    quantise(fp32, int8, calibration_requests(exact, requests, seed=trained.config.seed))
    return exact, replace(scorer, run=session_runner(int8))


def beyond_of(
    judgement: Evaluation, split: Split, text_vectors: NDArray[np.float32], genres: NDArray[np.bool_]
) -> dict[str, BeyondAccuracy]:
    """What each row's lists are like, by name."""
    requests = split.queries.take(split.queries.requests()[0])
    return {
        row.name: beyond_accuracy(row.lists, requests, split.train, text_vectors=text_vectors, item_genres=genres)
        for row in judgement.rows
        if row.lists is not None
    }


def true_relevance_of(
    judgement: Evaluation, split: Split, simulator: Simulator, sizes: Sizes
) -> dict[str, tuple[float, float, float]]:
    """What people truly like of each row's first ten, by name: the mean, and the ranker's paired lead over it (95 %)."""
    requests = split.queries.take(split.queries.requests()[0])
    rows = {row.name: row.lists for row in judgement.rows if row.lists is not None}
    liked = {name: true_relevance(simulator, requests, lists) for name, lists in rows.items()}
    return {
        name: (float(values.mean()), *interval(liked[RANKER] - values, requests.user, resamples=sizes.resamples))
        for name, values in liked.items()
    }


def truth_table(judgement: Evaluation, truth: dict[str, tuple[float, float, float]]) -> str:
    """Whether what ranks better is what people truly like better; only a simulated world can tell."""
    lines = [["simulated world", "NDCG@10", "true relevance of the first 10", f"{RANKER} ahead by, 95 %"]]
    for name, (mean, low, high) in truth.items():
        lead = "" if name == RANKER else f"{low:+.3f} to {high:+.3f}"
        lines.append([name, f"{judgement.row(name).ndcg[10]:.4f}", f"{mean:.3f}", lead])
    return aligned(lines)


def ranks_of(judgement: Evaluation) -> dict[str, Any]:
    """Ranks of every row, by name."""
    return {row.name: row.ranks for row in judgement.rows}
