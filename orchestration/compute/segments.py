"""Where a scorer is good and where it is not: the figures by history length, age of the item, head and tail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.co_visitation import DAY_MICROSECONDS, popularity
from orchestration.compute.evaluate import aligned, gain, intervals
from orchestration.compute.splits import Split

HISTORY_LENGTHS = ((0, 0), (1, 4), (5, 19), (20, None))
"""Events that a request could see, first and last of each segment."""
TRAINING_EVENTS = ((0, 0), (1, 9), (10, 99), (100, None))
"""Events of the label's item in training: without any, a model has only its text."""
AGE_DAYS = ((0, 6), (7, 29), (30, None))
"""Full days from the item's arrival to the label."""
HEAD_RATE = 0.2
"""The head is this share of the items with the most training events; the tail is the rest."""

Bins = tuple[tuple[int, int | None], ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """Figures of the labels of one segment; `low` to `high` is the 95 % interval of the NDCG over people."""

    name: str
    labels: int
    ndcg: float
    hr: float
    low: float
    high: float


def segments(
    rank: NDArray[np.int64], split: Split, *, k: int = 10, seed: int = 0, resamples: int = 1000
) -> list[Segment]:
    """NDCG@k and HR@k of `rank (q,)`, a row's ranks on the split, in every segment that has labels; all of them first."""
    members = {name: member for name, member in segment_labels(split).items() if member.any()}
    gains = gain(rank, k)
    values = np.stack([np.where(member, gains, np.nan) for member in members.values()], axis=1)
    low, high = intervals(values, split.queries.user, seed=seed, resamples=resamples)
    return [
        Segment(
            name,
            int(member.sum()),
            float(gains[member].mean()),
            float((rank[member] <= k).mean()),
            float(low[place]),
            float(high[place]),
        )
        for place, (name, member) in enumerate(members.items())
    ]


def segment_labels(split: Split) -> dict[str, NDArray[np.bool_]]:
    """Which labels `(q,)` each segment holds.

    Items have an age only where the catalogue says when one arrived; what has always been there is of the oldest.
    """
    queries = split.queries
    counts = popularity(split.train).astype(np.int64)
    found = {"all": np.ones(len(queries), bool)}
    found |= _binned("history of {} events", queries.stop - queries.start, HISTORY_LENGTHS)
    found |= _binned("item with {} training events", counts[queries.target], TRAINING_EVENTS)
    arrived = queries.interactions.available_at
    if arrived is not None and (arrived > np.iinfo(np.int64).min).any():
        # In days before the subtraction: the beginning of time less anything has no room in an integer.
        age = queries.at // DAY_MICROSECONDS - arrived[queries.target] // DAY_MICROSECONDS
        found |= _binned("item {} days old", age, AGE_DAYS)
    order = np.argsort(-counts, kind="stable")
    head = np.zeros(len(counts), bool)
    head[order[: int(np.ceil(len(counts) * HEAD_RATE))]] = True
    found["head"], found["tail"] = head[queries.target], ~head[queries.target]
    return found


def segment_table(ranks: Mapping[str, NDArray[np.int64]], split: Split, *, k: int = 10) -> str:
    """NDCG@k of every scorer in every segment as aligned text; the last scorer also with its interval."""
    by_name = {name: segments(rank, split, k=k) for name, rank in ranks.items()}
    last = next(reversed(by_name))
    lines = [[f"{split.name}, NDCG@{k}", "labels", *by_name, f"{last} 95 %"]]
    for row in zip(*by_name.values(), strict=True):
        lines.append(
            [
                row[0].name,
                f"{row[0].labels:,}",
                *(f"{segment.ndcg:.4f}" for segment in row),
                f"{row[-1].low:.4f}–{row[-1].high:.4f}",
            ]
        )
    return aligned(lines)


def _binned(pattern: str, values: NDArray[np.int64], bins: Bins) -> dict[str, NDArray[np.bool_]]:
    found = {}
    for first, last in bins:
        words = f"{first}" if first == last else f"{first}+" if last is None else f"{first}–{last}"
        # The first bin takes what is below: a clock that ran ahead makes an age of −1 day.
        low = values >= first if first > bins[0][0] else np.ones(len(values), bool)
        found[pattern.format(words)] = low & (values <= (np.iinfo(np.int64).max if last is None else last))
    return found
