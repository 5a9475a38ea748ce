"""The core: one request in, one explained slate out. It knows no transport and keeps no state of its own.

    read_person ─▶ user vector ─▶ pick_candidates ─▶ rank ─▶ re-rank ─▶ explain        two database round trips

The ladder, each rung named in `degraded`: `features` (read without them), `wish` (the encoder failed), `ranker` (no
released model: co-visitation and trending), `database` (the list that ships with the artefact), then Unavailable.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from inference import explain, metrics, rerank
from inference.candidates import Candidates, Filters
from inference.encoder import TextEncoder
from inference.ranker import Ranker
from inference.ranker_inputs import candidate_inputs, no_candidates, person_inputs
from inference.served import ServedLog, ServedRead
from inference.store import Champion, History, PersonRow, Store
from inference.telemetry import span
from schemas import prompts
from schemas.errors import ArtifactError, DefinitionError, Unavailable
from schemas.events import LIKED_VALUE, NEGATIVE_KINDS
from schemas.serving import RecommendationRequest, RecommendationResponse, RecommendedItem
from schemas.views import CANDIDATE_VIEWS, CONTEXT_VIEWS

logger = logging.getLogger(__name__)

RECENT_ITEMS = 20
"""So many of the newest items look up their co-visitation neighbours."""
FLOOR_VERSION = "co-visitation"


class Models(Protocol):
    """Where the core gets its models; see inference/runtime.py."""

    def ranker(self, champion: Champion) -> Ranker: ...

    def encoder(self) -> TextEncoder: ...

    def popular(self) -> list[tuple[str, str, float]]: ...


@dataclass(slots=True)
class Steps:
    """Where a request's time went: milliseconds per step, in order."""

    ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Generator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - start) * 1000


@dataclass(frozen=True, slots=True)
class Recommender:
    """Answers recommendation requests from a store and the models that are released."""

    store: Store
    models: Models
    candidates: int = 500
    timeout_ms: int = 2_000
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    served: ServedLog | None = None

    def recommend(
        self, request: RecommendationRequest, deadline: float | None = None, steps: Steps | None = None
    ) -> RecommendationResponse:
        """A slate of at most k items. `deadline` is an instant of `time.monotonic()`; `steps` collects timings.

        Raises Unavailable only when not even the shipped list of popular items can be had.
        """
        steps = steps or Steps()
        limits = [self.timeout_ms, request.timeout_ms or self.timeout_ms]
        if deadline is not None:
            limits.append(int((deadline - time.monotonic()) * 1000))
        end = time.monotonic() + max(min(limits), 1) / 1000
        request_id = request.request_id or uuid.uuid4().hex
        try:
            answer = self._personal(request, request_id, end, steps)
        except Unavailable:
            answer = self._shipped(request, request_id)
        metrics.answered(answer.model_version, answer.degraded, steps.ms)
        return answer

    def _personal(
        self, request: RecommendationRequest, request_id: str, end: float, steps: Steps
    ) -> RecommendationResponse:
        at = request.at or self.now()
        degraded: list[str] = []
        # A read at an instant that the caller names knows of later events what training does not: it is not audited.
        audited = request.at is None and self.served is not None and self.served.samples(request.user_id)
        with steps.step("read"):
            person = self.store.read_person(
                request.user_id, at, _left_ms(end), live=request.at is None, audited=audited
            )
        if request.at is None:
            metrics.features_read({name: columns.settled_at for name, columns in person.views.items()})
        ranker = self._ranker(person.champion, degraded)
        # A model has learned wishes as its own template writes them, whichever has won since.
        template = ranker.manifest.wish_template if ranker else person.wish_template
        wish_text = self._encode_wish(request.prompt, template, degraded, steps)
        asked = _Asked(request, at, person, wish_text, audited)
        if ranker is None:
            candidates, scores = self._by_floor(asked, end, steps)
        else:
            candidates, scores = self._by_ranker(ranker, asked, end, steps, degraded)
        with steps.step("re-rank"), span("re-rank", attributes={"recsys.rank.rows": len(candidates)}):
            if request.diversity and candidates.vectors.shape[1]:
                order = rerank.maximal_marginal_relevance(scores, candidates.vectors, request.k, request.diversity)
            else:
                order = rerank.best(scores, request.k)
        with steps.step("explain"):
            items = self._items(order, candidates, scores, person.history, request.explain)
        if audited and self.served is not None:
            self.served.offer(_served(asked, request_id, candidates, order))
        return RecommendationResponse(
            request_id=request_id,
            items=items,
            model_version=ranker.version if ranker else FLOOR_VERSION,
            prompt_version=template if wish_text is not None else None,
            degraded=tuple(degraded),
        )

    def _encode_wish(
        self, prompt: str | None, template: str, degraded: list[str], steps: Steps
    ) -> NDArray[np.float32] | None:
        if prompt is None:
            return None
        try:
            with steps.step("encode wish"), span("encode wish"):
                return self.models.encoder().encode_one(prompts.render_wish(prompts.load(template), prompt))
        except (ArtifactError, DefinitionError) as error:
            logger.error("a wish was not followed: %s", error)
            degraded.append("wish")
            return None

    def _ranker(self, champion: Champion | None, degraded: list[str]) -> Ranker | None:
        try:
            if champion is not None:
                return self.models.ranker(champion)
        except ArtifactError:
            pass
        degraded.append("ranker")
        return None

    def _by_floor(self, asked: _Asked, end: float, steps: Steps) -> tuple[Candidates, NDArray[np.float32]]:
        """Without a model: what is nearest to the wish; without one what people went on to, then what is trending."""
        with steps.step("candidates"):
            candidates = self.store.pick_candidates(
                at=asked.at,
                filters=asked.filters(),
                limit=self.candidates,
                timeout_ms=_left_ms(end),
                wish_text=asked.wish_text,
                recent=asked.recent(),
                given=asked.request.candidates,
                live=asked.request.at is None,
                audited=asked.audited,
            )
        place = np.arange(len(candidates), 0, -1, dtype=np.float32) / max(len(candidates), 1) * 1e-3
        evidence = candidates.evidence if asked.wish_text is None else candidates.wish
        return candidates, (evidence + place).astype(np.float32)

    def _by_ranker(
        self, ranker: Ranker, asked: _Asked, end: float, steps: Steps, degraded: list[str]
    ) -> tuple[Candidates, NDArray[np.float32]]:
        wish = ranker.project(asked.wish_text[None]) if asked.wish_text is not None else None
        with steps.step("user vector"):
            inputs = person_inputs(asked.person, asked.at, wish, ranker.dim)
            if (
                not all(asked.person.views[view.name].settled for view in CONTEXT_VIEWS)
                and asked.person.history.item_ids
            ):
                degraded.append("features")
            user_vector, _ = ranker.run(inputs | no_candidates(ranker.dim))
        with steps.step("candidates"):
            candidates = self.store.pick_candidates(
                at=asked.at,
                filters=asked.filters(),
                limit=self.candidates,
                timeout_ms=_left_ms(end),
                champion=ranker.version,
                dim=ranker.dim,
                user_vector=user_vector[0],
                wish_text=asked.wish_text,
                recent=asked.recent(),
                given=asked.request.candidates,
                live=asked.request.at is None,
                audited=asked.audited,
            )
        if asked.request.at is None:
            metrics.features_read({view.name: candidates.features.settled_at for view in CANDIDATE_VIEWS})
        if not len(candidates):
            return candidates, np.zeros(0, np.float32)
        with steps.step("rank"):
            rows = candidate_inputs(candidates, asked.person.views, asked.at)
            _, scores = ranker.run(inputs | rows)
        likeness = candidates.wish if asked.wish_text is not None else None
        return candidates, rerank.follow_wish(scores[0], likeness, ranker.manifest.wish_weight)

    def _items(
        self,
        order: NDArray[np.int64],
        candidates: Candidates,
        scores: NDArray[np.float32],
        history: History,
        with_reasons: bool,
    ) -> tuple[RecommendedItem, ...]:
        past_rows = [
            row
            for row, vector in enumerate(history.vectors)
            if vector is not None and history.titles[row] and _speaks_for(history.kinds[row], history.values[row])
        ]
        past = (
            np.stack([_row(history, row) for row in past_rows])
            if past_rows and with_reasons
            else np.zeros((0, 1), np.float32)
        )
        return tuple(
            RecommendedItem(
                item_id=candidates.item_ids[index],
                score=float(scores[index]),
                title=candidates.titles[index],
                reasons=explain.reasons(
                    candidates.vectors[index],
                    int(candidates.sources[index]),
                    history,
                    float(candidates.wish[index]),
                    past=past,
                    past_rows=past_rows,
                )
                if with_reasons
                else None,
            )
            for index in order.tolist()
        )

    def _shipped(self, request: RecommendationRequest, request_id: str) -> RecommendationResponse:
        """The list that ships with the artefact, when the database cannot be asked."""
        left_out = set(request.exclude)
        wanted = None if request.candidates is None else set(request.candidates)
        items = [
            RecommendedItem(
                item_id=item_id, score=score, title=title, reasons=("popular",) if request.explain else None
            )
            for item_id, title, score in self.models.popular()
            if item_id not in left_out and (wanted is None or item_id in wanted)
        ]
        return RecommendationResponse(
            request_id=request_id, items=tuple(items[: request.k]), model_version="popular", degraded=("database",)
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request with what was read for it."""

    request: RecommendationRequest
    at: datetime
    person: PersonRow
    wish_text: NDArray[np.float32] | None
    audited: bool = False

    def filters(self) -> Filters:
        # Candidates that the caller names are ranked even if the person had them.
        seen = [] if self.request.candidates is not None else self.person.history.item_ids
        return Filters(
            exclude=list(dict.fromkeys([*self.request.exclude, *seen])),
            categories=self.request.filters.categories or None,
            exclude_categories=self.request.filters.exclude_categories,
        )

    def recent(self) -> list[str]:
        history = self.person.history
        liked = [item for item, kind in zip(history.item_ids, history.kinds, strict=True) if kind not in NEGATIVE_KINDS]
        return list(dict.fromkeys(reversed(liked)))[:RECENT_ITEMS]


def _speaks_for(kind: str, value: float | None) -> bool:
    """Whether an event is a reason to be shown something alike: nothing hidden, nothing rated low."""
    return kind not in NEGATIVE_KINDS and (kind != "rating" or value is None or value >= LIKED_VALUE)


def _served(asked: _Asked, request_id: str, candidates: Candidates, order: NDArray[np.int64]) -> ServedRead:
    shown = order.tolist()
    return ServedRead(
        request_id,
        asked.request.user_id,
        asked.at,
        asked.person.views,
        candidates.features,
        [candidates.item_ids[index] for index in shown],
        [candidates.categories[index] for index in shown],
    )


def _row(history: History, row: int) -> NDArray[np.float32]:
    vector = history.vectors[row]
    assert vector is not None
    return vector


def _left_ms(end: float) -> int:
    left = int((end - time.monotonic()) * 1000)
    if left <= 0:
        raise Unavailable("the deadline passed before the database could be asked")
    return left
