"""In the simulated world, whose truth is known: a better NDCG means lists that people truly like more."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import numpy as np
import torch
from numpy.typing import NDArray

from orchestration.compute.baselines import floors
from orchestration.compute.evaluate import Evaluation, Gain, Scorer, best_items, evaluate, interval
from orchestration.compute.interactions import Interactions
from orchestration.compute.splits import Split, time_split
from orchestration.compute.train import train
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.true_relevance import true_relevance
from orchestration.sources.simulator import BATCH_KINDS, Simulator, item_id, user_id
from orchestration.sources.simulator_world import World
from schemas.events import KINDS, Item
from schemas.ranker import TEXT_DIM

START = date(2026, 1, 5)
QUICK = World(START, seed=11, people=250, items=200, days=40, events_per_person=40)


@dataclass(frozen=True)
class Confirmed:
    """Every scorer's evaluation, and the true relevance `(r,)` of what it showed for each request."""

    split: Split
    evaluation: Evaluation
    relevance: dict[str, NDArray[np.float64]]

    def truer(self, one: str, other: str) -> Gain:
        """How much truer the lists of one scorer are than another's."""
        first, _ = self.split.queries.requests()
        difference = self.relevance[one] - self.relevance[other]
        return Gain(float(difference.mean()), *interval(difference, self.split.queries.take(first).user))

    def contradictions(self) -> list[str]:
        """Pairs in which one scorer's NDCG is better and the other's lists are truer, both beyond chance."""
        names = list(self.relevance)
        return [
            f"{one} has {self.evaluation.gain(one, other)} of NDCG over {other}, and {self.truer(one, other)} of relevance"
            for one in names
            for other in names
            if self.evaluation.gain(one, other).low > 0 and self.truer(one, other).high < 0
        ]


def interactions(source: Simulator) -> Interactions:
    """The simulator's events as every learner gets them."""
    batches = list(source.batches())
    user, item, kind, value, seconds = (
        np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("user", "item", "kind", "value", "seconds")
    )
    catalogue = [entry for entry in source.items() if isinstance(entry, Item)]
    order = np.lexsort((seconds, user))
    started = int(source.world.started_at.timestamp() * 1e6)
    kinds = np.array([KINDS.index(name) + 1 for name in BATCH_KINDS])
    return Interactions(
        np.array([user_id(number) for number in range(int(user.max()) + 1)]),
        np.array([item_id(number) for number in range(len(catalogue))]),
        user[order].astype(np.int32),
        item[order].astype(np.int32),
        started + seconds[order] * 1_000_000,
        kinds[kind[order]],
        value[order],
        np.array([int(entry.available_at.timestamp() * 1e6) for entry in catalogue if entry.available_at]),
    )


def texts(source: Simulator) -> NDArray[np.float32]:
    """`(items, 384)`: the words of each text, every word a random direction: an encoder that knows no meaning."""
    rows = []
    for entry in source.items():
        assert isinstance(entry, Item)
        words = f"{entry.title} {' '.join(entry.categories)} {entry.description}".lower().split()
        seeds = [zlib.crc32(word.encode()) for word in words]
        rows.append(sum(np.random.default_rng(seed).standard_normal(TEXT_DIM) for seed in seeds))
    vectors = np.array(rows, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def confirm(world: World, config: TrainConfig) -> Confirmed:
    """Train on the first 90 % of a world's events, and judge the ranker and every floor on the rest."""
    source = Simulator(world, datetime.combine(START, datetime.min.time(), UTC) + timedelta(days=world.days))
    split = time_split(interactions(source))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trained = train(split.train, texts(source), config)
    finally:
        torch.set_num_threads(threads)
    rows: dict[str, Scorer] = {**floors(split), "ranker": trained.scorer()}
    evaluation = evaluate(rows, split)
    requests = split.queries.take(split.queries.requests()[0])
    relevance = {}
    for row in evaluation.rows:
        assert row.lists is not None
        relevance[row.name] = true_relevance(source, requests, row.lists)
    return Confirmed(split, evaluation, relevance)


def test_the_truth_has_the_truest_lists_and_noise_makes_them_less_true() -> None:
    """The measure itself: a list by the world's own utilities is the best there is, and each doubling of noise costs."""
    source = Simulator(QUICK, datetime.combine(START, datetime.min.time(), UTC) + timedelta(days=QUICK.days))
    split = time_split(interactions(source))
    requests = split.queries.take(split.queries.requests()[0]).take(slice(0, 60))
    q, items = len(requests), len(requests.interactions.item_ids)
    utility = np.stack(
        [
            true_relevance(source, requests, np.full((q, 1), item, np.int32), k=1)
            for item in range(items)
        ],
        axis=1,
    )  # fmt: skip
    generator = np.random.default_rng(0)
    found = []
    for noise in (0.0, 1.0, 2.0, 4.0, 100.0):
        noisy = (utility + noise * generator.standard_normal(utility.shape)).astype(np.float32)
        lists = best_items(noisy, requests.seen(), 10)
        found.append(float(true_relevance(source, requests, lists).mean()))
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1] + 1.5
    assert np.isnan(true_relevance(source, requests, np.full((q, 10), -1, np.int32))).all()
