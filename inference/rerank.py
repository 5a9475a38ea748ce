"""From scores to a slate: the best k, spread out when the request asks for it, within what the rules allow."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


def follow_wish(
    scores: NDArray[np.float32], likeness: NDArray[np.float32] | None, weight: float
) -> NDArray[np.float32]:
    """`scores (…, n)` moved towards a wish; unchanged without one. Serving and evaluation both call this.

    `likeness (…, n)` is the cosine of the wish's text and the candidate's, `weight` the model's `wish_weight`: logits per
    unit of it. The ranker meets the wish in item space, which is made for what people go on to and blurs what texts say.
    """
    if likeness is None:
        return scores
    return np.asarray(scores + np.float32(weight) * likeness, np.float32)


def best(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Indices `(min(k, n),)` of the highest scores, best first; ties keep their order."""
    return np.argsort(-scores, kind="stable")[:k]


def maximal_marginal_relevance(
    scores: NDArray[np.float32], vectors: NDArray[np.float32], k: int, diversity: float
) -> NDArray[np.int64]:
    """Indices of k items chosen one by one, each for its score less its likeness to those chosen (Carbonell & Goldstein 1998).

    `scores (n,)`, `vectors (n, d)` of length 1; `diversity` 0 ranks by score alone, 1 by unlikeness alone. Scores are
    brought to 0–1 over the candidates, so that both terms have one scale.
    """
    return choose(scores, k, vectors=vectors, diversity=diversity).order


@dataclass(frozen=True, slots=True)
class Limits:
    """How many slots g groups may (`most`) and should (`least`) have, both `(g,)` int; `members (g, n)` bool says who belongs.

    `most` is never passed. `least` is met as far as the candidates go.
    """

    members: NDArray[np.bool_]
    most: NDArray[np.int64]
    least: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.most)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Places `order (≤ k,)` of the slate, best first. Where it is shorter than k, `blocking` are the groups whose limit keeps
    what is left out; `missed` are groups with less than they should have: how many slots each."""

    order: NDArray[np.int64]
    blocking: list[int] = field(default_factory=list)
    missed: dict[int, int] = field(default_factory=dict)


def choose(
    scores: NDArray[np.float32],
    k: int,
    *,
    vectors: NDArray[np.float32] | None = None,
    diversity: float = 0.0,
    limits: Limits | None = None,
) -> Chosen:
    """The slate of k items, picked one by one: for its score, less its likeness to those picked, among those allowed.

    `scores (n,)`, `vectors (n, d)` of length 1 as for `maximal_marginal_relevance`; without `vectors` by score alone. As
    soon as the slots left are no more than the groups still lack, only items that they lack are picked.
    """
    n = len(scores)
    if limits is None and (vectors is None or not diversity):
        return Chosen(best(scores, k))
    if limits is None:
        limits = Limits(np.zeros((0, n), bool), np.zeros(0, np.int64), np.zeros(0, np.int64))
    if vectors is None:
        diversity = 0.0
    spread = float(scores.max(initial=-np.inf) - scores.min(initial=np.inf)) if n else 0.0
    relevance = (scores - scores.min(initial=np.inf)) / (spread or 1.0) if n else scores
    # What is alike in all that counts is told apart by its score: at diversity 1 that is how the first is picked.
    worth = (1 - diversity) * relevance + np.float32(1e-6) * relevance
    likeness = np.zeros(n, np.float32)
    open_ = np.ones(n, bool)
    have = np.zeros(len(limits), np.int64)
    picked: list[int] = []
    slots = min(k, n)
    for slot in range(slots):
        open_ &= ~limits.members[have >= limits.most].any(axis=0)
        if not open_.any():
            break
        lacking = np.minimum(limits.least - have, (limits.members & open_).sum(axis=1)).clip(0)
        eligible = open_
        if lacking.any() and int(lacking.sum()) >= slots - slot:
            helps = np.where(open_, limits.members[lacking > 0].sum(axis=0), 0)
            eligible = helps == helps.max()
        value = np.where(eligible, worth - diversity * likeness, -np.inf)
        pick = int(np.argmax(value))
        picked.append(pick)
        open_[pick] = False
        have += limits.members[:, pick]
        if vectors is not None and diversity:
            like = vectors @ vectors[pick]
            likeness = np.maximum(likeness, like) if slot else like
    order = np.array(picked, np.int64)
    left = np.ones(n, bool)
    left[order] = False
    blocking = []
    if len(order) < slots:
        full = have >= limits.most
        blocking = [group for group in np.flatnonzero(full).tolist() if (limits.members[group] & left).any()]
    missed = limits.least - have
    return Chosen(order, blocking, {group: int(missed[group]) for group in np.flatnonzero(missed > 0).tolist()})
