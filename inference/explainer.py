"""Explaining a slate: pick what to try, read the evidence, run the ranker without each in one batch, and say what it did.

    wish less a clause ─▶ encoded      history ─▶ at most 16 items     one round trip     one batch     wording

All of it happens after the slate is chosen and changes nothing of it. Where there is not the time, or the database or the
model fails, whoever asks is told so and gives plain reasons instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from inference import counterfactuals, explain
from inference.candidates import Candidates
from inference.counterfactuals import Changes, Effects, Past
from inference.deadline import Deadline, Pace
from inference.evidence import Evidence, read_evidence
from inference.explain import Explained
from inference.machine import PROCESSORS
from inference.ranker import Answer, Inputs, Ranker
from inference.store import History, Store
from inference.telemetry import span
from schemas import prompts
from schemas.errors import ArtifactError, DefinitionError, Unavailable
from schemas.serving import Because

logger = logging.getLogger(__name__)

EXPLAIN_SHARE = 0.5
"""Of the time left when the slate is there, what its explanation may take."""
RIVALS = 12
"""Items just below the slate that are scored beside it: an item's place is one among others, and what moves all alike moves
nobody's."""
WORTH_SHARING = 500
"""Tokens of a batch below which a second thread takes longer to start than it saves."""


class Models(Protocol):
    """What an explanation needs of the models; see inference/models.py."""

    def run(self, ranker: Ranker, inputs: Inputs, left_ms: float, pace: Pace) -> Answer: ...

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
        placed = np.concatenate([order, _rivals(ranking.scores, order)])
        ids = [candidates.item_ids[place] for place in placed.tolist()]
        k = len(order)
        changes = Changes(
            wishes=ranking.ranker.project(np.stack(texts)) if texts else None,
            has_wish=ranking.wish is not None,
            views=counterfactuals.known_views(ranking.inputs),
        )
        most = counterfactuals.most_removals(ranking.inputs, len(placed), len(changes))
        sure = counterfactuals.surely(past, most)
        changes = replace(changes, removed=[past.rows[place] for place in sure.tolist()])

        def rest() -> tuple[Evidence, list[int]]:
            """The evidence, and what else it says should be left out: places of the past."""
            found = read_evidence(self.store, ids[:k], ids[k:], past.item_ids, texts, within.share_ms(1.0))
            chosen = counterfactuals.preselect(past, candidates.vectors[order], found.people, most)
            return found, np.setdiff1d(chosen, sure).tolist()

        scores, evidence, others = self._run(ranking, placed, changes, past, rest, min(len(past), most), within)
        scores += _wish_part(ranking, placed, changes, len(others), evidence)
        tried = [_Tried("event", past=place) for place in sure.tolist()]
        tried += [_Tried("wish", words=words) for words in ([ranking.wish, *parts] if ranking.wish else [])]
        tried += [_Tried("features", view=view.name) for view in changes.views]
        tried += [_Tried("event", past=place) for place in others]
        moved = counterfactuals.effects(scores, k)
        return [
            explain.tried(
                _because(ranking, past, tried, evidence, moved, place, float(ranking.scores[index])),
                int(candidates.sources[index]),
                history,
                ranking.wish,
            )
            for place, index in enumerate(order.tolist())
        ]

    def _run(
        self,
        ranking: Ranking,
        placed: NDArray[np.int64],
        changes: Changes,
        past: Past,
        rest: Callable[[], tuple[Evidence, list[int]]],
        removals: int,
        within: Deadline,
    ) -> tuple[NDArray[np.float32], Evidence, list[int]]:
        """Scores `(b, n)` under `changes`, then without each of the other events that `rest` names, whose answer is given, too.

        A large batch, of `removals` events in all, is shared by two processors where there are as many: one begins with what
        is known already, while `rest` waits for the database.
        """
        n = placed.tolist()
        first = counterfactuals.batch(ranking.inputs, n, changes, ranking.history, ranking.at)

        def scored(inputs: Inputs) -> NDArray[np.float32]:
            return self.models.run(ranking.ranker, inputs, within.left_ms(), self.pace)[1]

        def more(others: list[int]) -> dict[str, NDArray[np.generic]]:
            removed = Changes(removed=[past.rows[place] for place in others])
            made = counterfactuals.batch(ranking.inputs, n, removed, ranking.history, ranking.at)
            return _rows(made, slice(1, None))

        rows = len(changes) + removals - len(changes.removed)
        tokens = rows * (first["history_vectors"].shape[1] + len(n))
        if PROCESSORS < 2 or tokens < WORTH_SHARING or rows < 2:
            evidence, others = rest()
            return scored(_joined(first, more(others)) if others else first), evidence, others
        half = min((rows + 1) // 2, len(changes))
        # Within a run threads wait for each other at every product; two runs wait once.
        with ThreadPoolExecutor(1, "larder-explain") as other:
            begun = other.submit(copy_context().run, scored, _rows(first, slice(half)))
            evidence, others = rest()
            left = _rows(first, slice(half, None))
            left = _joined(left, more(others)) if others else left
            scores = scored(left) if len(left["history_mask"]) else np.zeros((0, len(n)), np.float32)
            return np.concatenate([begun.result(), scores]), evidence, others

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


@dataclass(frozen=True, slots=True)
class _Tried:
    """What was left out in one row of the batch."""

    kind: Literal["event", "wish", "features"]
    past: int = 0
    words: str | None = None
    view: str | None = None


def _rows(inputs: Inputs, part: slice) -> dict[str, NDArray[np.generic]]:
    return {name: value[part] for name, value in inputs.items()}


def _joined(first: Inputs, second: Inputs) -> dict[str, NDArray[np.generic]]:
    return {name: np.concatenate([value, second[name]]) for name, value in first.items()}


def _wish_part(
    ranking: Ranking, placed: NDArray[np.int64], changes: Changes, others: int, evidence: Evidence
) -> NDArray[np.float32]:
    """`(changes + others, n)`: what the wish adds to each score beside the ranker's own, see `rerank.follow_wish`."""
    part = np.zeros((len(changes) + others, len(placed)), np.float32)
    if changes.has_wish:
        part[:] = ranking.candidates.wish[placed]
        part[changes.first_wish] = 0.0
        part[changes.first_wish + 1 : changes.first_view] = evidence.fits
    return np.asarray(part * np.float32(ranking.ranker.manifest.wish_weight), np.float32)


def _because(
    ranking: Ranking,
    past: Past,
    tried: list[_Tried],
    evidence: Evidence,
    moved: Effects,
    place: int,
    score: float,
) -> list[Because]:
    """What was tried, with its effect on the shown item at `place`; of events those that moved it most, and for it."""
    counted = [n for n, one in enumerate(tried) if one.kind != "event" or moved.effect[n, place] > 0]
    counted.sort(key=lambda n: (-int(moved.places[n, place]), -float(moved.lead[n, place])))
    events = [n for n in counted if tried[n].kind == "event"][: explain.MOST_REASONS]
    others = [n for n in counted if tried[n].kind != "event"]

    def told(number: int) -> Because:
        one, effect = tried[number], float(moved.effect[number, place])
        is_event = one.kind == "event"
        both = int(evidence.people[one.past, place]) if is_event else 0
        return Because(
            kind=one.kind,
            item_id=past.item_ids[one.past] if is_event else None,
            title=ranking.history.titles[past.rows[one.past][0]] if is_event else None,
            words=one.words,
            view=one.view,
            score_without=score - effect,
            effect=effect,
            places=int(moved.places[number, place]),
            people_both=both or None,
        )

    return [told(number) for number in (*events, *others)]


def _rivals(scores: NDArray[np.float32], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of the best candidates that are not shown."""
    left = np.ones(len(scores), bool)
    left[order] = False
    below = np.flatnonzero(left)
    return np.asarray(below[np.argsort(-scores[below], kind="stable")][:RIVALS], np.int64)
