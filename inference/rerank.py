"""From scores to a slate: the best k, spread out when the request asks for it."""

from __future__ import annotations

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
    n = len(scores)
    spread = float(scores.max(initial=0) - scores.min(initial=0)) or 1.0
    relevance = (scores - scores.min(initial=0)) / spread
    likeness = np.zeros(n, np.float32)
    free = np.ones(n, bool)
    chosen: list[int] = []
    for _ in range(min(k, n)):
        value = np.where(free, (1 - diversity) * relevance - diversity * likeness, -np.inf)
        pick = int(np.argmax(value))
        chosen.append(pick)
        free[pick] = False
        likeness = np.maximum(likeness, vectors @ vectors[pick])
    return np.array(chosen, np.int64)
