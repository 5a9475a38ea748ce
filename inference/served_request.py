"""What one recommendation showed and what made it: the row of `served_requests`, and of `shadow_requests` for a shadow.

A request hands over references; the row is made of them by the log's thread, after the answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from inference.candidates import SOURCES, Candidates
from inference.experiment import Assignment
from inference.explore import POOL, Drawn
from schemas.serving import RecommendationResponse

ARM = "arm"
"""The rung of an answer that is not what the person's arm declares: it counts for no arm."""
SHIPPED = "shipped"
"""The source of what comes from the list that ships with the artefact."""


@dataclass(frozen=True, slots=True)
class Slate:
    """What a slate was chosen from: how many candidates, the bits of their sources, the ranked pool where it is kept."""

    sources: NDArray[np.int64] | None
    candidates: int
    drawn: Drawn | None = None
    pool_ids: Sequence[str] | None = None
    pool_scores: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """One answer, to be logged."""

    user_id: str
    at: datetime
    wish: str | None
    answer: RecommendationResponse
    slate: Slate
    assignment: Assignment | None = None
    shadow: bool = False

    def row(self) -> dict[str, object]:
        """What `log_served_requests` takes (schemas/sql/)."""
        answer, slate, assigned = self.answer, self.slate, self.assignment
        drawn, sources = slate.drawn, slate.sources
        counts = (
            {SHIPPED: slate.candidates}
            if sources is None
            else {name: int(np.count_nonzero(sources & bit)) for name, bit in SOURCES.items()}
        )
        return {
            "request_id": answer.request_id,
            "shadow": self.shadow,
            "user_id": self.user_id,
            "served_at": self.at.isoformat(),
            "wish_digest": None if self.wish is None else wish_digest(self.wish),
            "experiment": assigned.experiment.name if assigned else None,
            "arm": assigned.arm.name if assigned else None,
            "arm_share": assigned.arm.share if assigned else None,
            "model_version": answer.model_version,
            "prompt_version": answer.prompt_version,
            "item_ids": [item.item_id for item in answer.items],
            "scores": [item.score for item in answer.items],
            "propensities": drawn.propensities.tolist() if drawn else None,
            "candidate_ids": None if slate.pool_ids is None else list(slate.pool_ids),
            "candidate_scores": None if slate.pool_scores is None else slate.pool_scores.tolist(),
            "candidates": slate.candidates,
            "sources": {name: count for name, count in counts.items() if count},
            "degraded": list(answer.degraded),
        }


def slate_of(candidates: Candidates, scores: NDArray[np.float32], drawn: Drawn | None, keep_pool: bool) -> Slate:
    """The slate chosen from `candidates` by `scores (n,)`, with the POOL best of them where it was drawn or `keep_pool`."""
    if drawn is None and not keep_pool:
        return Slate(candidates.sources, len(candidates))
    best = np.argsort(-scores, kind="stable")[:POOL]
    ids = [candidates.item_ids[place] for place in best.tolist()]
    return Slate(candidates.sources, len(candidates), drawn, ids, scores[best])


def wish_digest(wish: str) -> str:
    """What leaves the process of a wish; the database makes a keyed hash of it. Case and blanks make no other wish."""
    return hashlib.sha256(" ".join(wish.casefold().split()).encode("utf-8", "surrogatepass")).hexdigest()
