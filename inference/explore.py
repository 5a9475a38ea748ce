"""Exploration: a share of slates in an order drawn at random, good items first more often, with what each draw was worth.

Plackett-Luce (Luce 1959, Plackett 1975) by the Gumbel-max trick (Yellott 1977): at each place the item with the highest
score / temperature + Gumbel noise is taken, which is a draw from the softmax of those that are left. The noise follows from
the request's id alone, so that an equal request gets an equal answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POOL = 100
"""Slates are drawn from so many of the best, and the whole pool is logged: whatever might have been shown can be judged.
A slate longer than this is not explored."""
TEMPERATURE = 0.5
"""In logits. At 1 the slate would be drawn from the model's own distribution, at 0 it is the ranking; halfway items whose
scores differ by one logit change places in one of eight draws."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """An explored slate: `order (k,) int64` indices in order, `propensities (k,) float64` of each item at its place given those
    before it."""

    order: NDArray[np.int64]
    propensities: NDArray[np.float64]


def explores(request_id: str, share: float) -> bool:
    """Whether a request is one of the `share` that is explored: always the same ones."""
    if share <= 0:
        return False
    digest = hashlib.blake2b(_bytes(request_id), digest_size=8, person=b"larder-explore").digest()
    return (int.from_bytes(digest) >> 11) / 2**53 < share


def draw(
    request_id: str,
    scores: NDArray[np.float32],
    k: int,
    vectors: NDArray[np.float32] | None = None,
    diversity: float = 0.0,
    temperature: float = TEMPERATURE,
) -> Drawn:
    """Draw k of `scores (n,)` (logits) one by one, out of the POOL best.

    With `vectors (n, d)` of length 1 and `diversity` above 0 what is drawn by is the value of maximal marginal relevance
    (`inference.rerank`), brought back to the scale of scores: then a draw hangs on those before it, as its propensity does.
    """
    pool = np.argsort(-scores, kind="stable")[:POOL]
    relevance = scores[pool].astype(np.float64)
    k = min(k, len(pool))
    noise = gumbel(request_id, k, len(pool))
    unlike = vectors is not None and diversity > 0
    if unlike:
        assert vectors is not None
        whole = float(scores.max(initial=0) - scores.min(initial=0)) or 1.0
        relevance = (1 - diversity) * relevance
        near = vectors[pool].astype(np.float64)
        likeness = np.zeros(len(pool))
    free = np.ones(len(pool), bool)
    chosen = np.zeros(k, np.int64)
    propensities = np.zeros(k)
    for place in range(k):
        value = relevance - diversity * whole * likeness if unlike else relevance
        value = np.where(free, value / temperature, -np.inf)
        pick = int(np.argmax(value + noise[place]))
        weights = np.exp(value - value.max())
        chosen[place], propensities[place] = pick, weights[pick] / weights.sum()
        free[pick] = False
        if unlike:
            likeness = np.maximum(likeness, near @ near[pick])
    return Drawn(pool[chosen], propensities)


def gumbel(request_id: str, k: int, n: int) -> NDArray[np.float64]:
    """Noise `(k, n)` of the standard Gumbel distribution that follows from the request's id, on every machine alike."""
    # An extendable hash is a generator whose stream no release of a library changes.
    stream = hashlib.shake_128(b"larder-gumbel\0" + _bytes(request_id)).digest(8 * k * n)
    uniform = ((np.frombuffer(stream, "<u8") >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.asarray(-np.log(-np.log(uniform)), np.float64).reshape(k, n)


def _bytes(request_id: str) -> bytes:
    return request_id.encode("utf-8", "surrogatepass")
