"""Explaining a slate: pick what to try, read the evidence, run the ranker once without each, and say what it did.

    wish less a clause ─▶ encoded      history ─▶ at most 16 items     one round trip     one run     wording

All of it happens after the slate is chosen and changes nothing of it. Where there is not the time, or the database or the
model fails, whoever asks is told so and gives plain reasons instead.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from inference import counterfactuals, explain
from inference.candidates import Candidates
from inference.counterfactuals import Changes, Past
from inference.deadline import Deadline, Pace
from inference.evidence import Evidence, read_evidence
from inference.explain import Explained
from inference.ranker import Answer, Inputs, Ranker
from inference.store import History, Store
from inference.telemetry import span
from schemas import prompts
from schemas.errors import ArtifactError, DefinitionError, Unavailable
from schemas.serving import Because

logger = logging.getLogger(__name__)

EXPLAIN_SHARE = 0.5
"""Of the time left when the slate is there, what its explanation may take."""
RIVALS = 24
"""Items just below the slate that are scored beside it: a removal that moves all alike moves nobody's place."""


class Models(Protocol):
    """What an explanation needs of the models; see inference/models.py."""

    def run(self, ranker: Ranker, inputs: Inputs, left_ms: float, pace: Pace | None = None) -> Answer: ...

    def encode(self, text: str, left_ms: float, space: str | None = None) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class Ranking:
    """How a slate came about: the person's and the candidates' inputs, one request's, and the scores `(n,)` from them."""

    ranker: Ranker
    inputs: Inputs
    candidates: Candidates
    scores: NDArray[np.float32]
    history: History
    at: datetime
    wish: str | None = None
    """In words, if it was followed."""


@dataclass(slots=True)
class Explainer:
    """Explains slates; safe to share between threads."""

    store: Store
    models: Models
    pace: Pace = field(default_factory=Pace)
    """Of their runs: one that would come too late is not begun."""

    def explain(self, ranking: Ranking, order: NDArray[np.int64], ends: Deadline) -> list[Explained]:
        """One explanation per shown item, `order (k,)` being their places among the candidates.

        Raises Unavailable, StatementFailed or ArtifactError where nothing could be tried in time.
        """
        if not len(order):
            return []
        left = ends.share_ms(EXPLAIN_SHARE)
        if not self.pace.fits(left):
            raise Unavailable(f"explaining lately took longer than the {left:.0f} ms that it may take")
        with span("explain", attributes={"recsys.rank.rows": len(order)}):
            return self._explain(ranking, order, Deadline.after(left))

    def _explain(self, ranking: Ranking, order: NDArray[np.int64], within: Deadline) -> list[Explained]:
        candidates, history = ranking.candidates, ranking.history
        past = counterfactuals.past_of(history, ranking.ranker.dim)
        parts, texts = self._clauses(ranking, within)
        shown_ids = [candidates.item_ids[place] for place in order.tolist()]
        evidence = read_evidence(self.store, shown_ids, past.item_ids, texts, within.share_ms(1.0))
        chosen = counterfactuals.preselect(past, candidates.vectors[order], evidence.people)
        changes = Changes(
            [past.rows[place] for place in chosen.tolist()],
            ranking.ranker.project(np.stack(texts)) if texts else None,
            ranking.wish is not None,
            counterfactuals.known_views(ranking.inputs),
        )
        rivals = _rivals(ranking.scores, order)
        places = [*order.tolist(), *rivals.tolist()]
        inputs = counterfactuals.batch(ranking.inputs, places, changes, history, ranking.at)
        _, logits = self.models.run(ranking.ranker, inputs, within.left_ms(), self.pace)
        k = len(order)
        fits = np.zeros((len(changes), k), np.float32)
        if changes.has_wish:
            weight = np.float32(ranking.ranker.manifest.wish_weight)
            fits[:] = weight * candidates.wish[order]
            fits[changes.first_wish] = 0.0
            fits[changes.first_wish + 1 : changes.first_view] = weight * evidence.fits
        scores = logits[:, :k] + fits
        effects = scores[:1] - scores[1:]  # (changes, k)
        common = (logits[:1, k:] - logits[1:, k:]).mean(axis=1) if len(rivals) else np.zeros(len(effects))
        return [
            explain.tried(
                _because(ranking, past, chosen, evidence, changes, parts, effects[:, place], common, place, index),
                int(candidates.sources[index]),
                history,
                ranking.wish,
            )
            for place, index in enumerate(order.tolist())
        ]

    def _clauses(self, ranking: Ranking, within: Deadline) -> tuple[list[str], list[NDArray[np.float32]]]:
        """Each clause of the wish, and the vector `(384,)` of the wish without it."""
        if ranking.wish is None:
            return [], []
        wording = prompts.load(ranking.ranker.manifest.wish_template)
        names: list[str] = []
        vectors: list[NDArray[np.float32]] = []
        for clause, left in counterfactuals.clauses(ranking.wish):
            try:
                text = prompts.render_wish(wording, left)
                vectors.append(self.models.encode(text, within.share_ms(0.5), ranking.ranker.manifest.encoder_version))
            except (ArtifactError, DefinitionError, Unavailable) as error:
                logger.warning("a wish is explained as a whole: %s", error)
                return [], []
            names.append(clause)
        return names, vectors


def _because(
    ranking: Ranking,
    past: Past,
    chosen: NDArray[np.int64],
    evidence: Evidence,
    changes: Changes,
    parts: list[str],
    effects: NDArray[np.float32],
    common: NDArray[np.float32],
    place: int,
    index: int,
) -> list[Because]:
    """What was tried, with its effect on the shown item at `place`; events only where they moved it more than its rivals."""
    score = float(ranking.scores[index])
    history = ranking.history

    def moved(effect: float) -> dict[str, float]:
        return {"score_without": score - effect, "effect": effect}

    found = []
    for number, event in enumerate(chosen.tolist()):
        row = past.rows[event][0]
        both = int(evidence.people[event, place])
        found.append(
            (
                float(effects[number] - common[number]),
                Because(
                    kind="event",
                    item_id=past.item_ids[event],
                    title=history.titles[row],
                    people_both=both or None,
                    **moved(float(effects[number])),
                ),
            )
        )
    named = [one for lead, one in sorted(found, key=lambda entry: -entry[0]) if lead > 0 and (one.effect or 0) > 0]
    because = named[: explain.MOST_REASONS]
    if changes.has_wish:
        words = [ranking.wish or "", *parts]
        because += [
            Because(kind="wish", words=said, **moved(float(effects[changes.first_wish - 1 + number])))
            for number, said in enumerate(words)
        ]
    because += [
        Because(kind="features", view=view.name, **moved(float(effects[changes.first_view - 1 + number])))
        for number, view in enumerate(changes.views)
    ]
    return because


def _rivals(scores: NDArray[np.float32], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of the best candidates that are not shown."""
    left = np.ones(len(scores), bool)
    left[order] = False
    below = np.flatnonzero(left)
    return np.asarray(below[np.argsort(-scores[below], kind="stable")][:RIVALS], np.int64)
