"""The core: one request in, one explained slate out. It knows no transport and keeps no state of its own.

    read_person ─▶ user vector ─▶ pick_candidates ─▶ rank ─▶ re-rank ─▶ explain        two database round trips

The ladder, each rung named in `degraded`: `features` (read without them), `wish` (the encoder failed), `release` (the
model before goes on, because the champion cannot be loaded), `arm` (not what the person's arm of an experiment declares),
`ranker` (no model: co-visitation and trending), `database` (the list that ships with the artefact), then Unavailable. Each step gets a share of the time that is left, so that the
rungs below it have some.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from inference import explain, metrics, rerank
from inference.arms import NO_PLAN, Plan
from inference.breaker import Resting
from inference.candidates import Candidates, Filters
from inference.connections import Lost, StatementFailed
from inference.deadline import CANDIDATES_SHARE, FLOOR_SHARE, MODEL_SHARE, READ_SHARE, Deadline
from inference.models import PopularItem
from inference.ranker import Answer, Inputs, Ranker
from inference.ranker_inputs import candidate_inputs, no_candidates, person_inputs
from inference.served import ServedLog, ServedRead
from inference.served_request import ARM, Slate, slate_of
from inference.store import Champion, History, PersonRow, Store
from inference.telemetry import span
from inference.trials import Trials
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
    """Where the core gets its models; see inference/models.py."""

    def current(self) -> Ranker | None: ...

    def follow(self, champion: Champion) -> bool: ...

    def first(self, champion: Champion, wait_ms: float) -> Ranker: ...

    def run(self, ranker: Ranker, inputs: Inputs, left_ms: float) -> Answer: ...

    def encode(self, text: str, left_ms: float, space: str | None = None) -> NDArray[np.float32]: ...

    def popular(self, wait_ms: float) -> Sequence[PopularItem]: ...


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
    trials: Trials | None = None

    def recommend(
        self, request: RecommendationRequest, deadline: float | None = None, steps: Steps | None = None
    ) -> RecommendationResponse:
        """A slate of at most k items. `deadline` is an instant of `time.monotonic()`; `steps` collects timings.

        Raises Unavailable only when not even the shipped list of popular items can be had.
        """
        steps = steps or Steps()
        limits: list[float] = [self.timeout_ms, request.timeout_ms or self.timeout_ms]
        if deadline is not None:
            limits.append((deadline - time.monotonic()) * 1_000)
        ends = Deadline.after(max(min(limits), 1))
        request_id = request.request_id or uuid.uuid4().hex
        # What is known of the person by then holds on the last rung too.
        seen: list[str] = []
        at = request.at or self.now()
        plan = self.trials.plan(request, at) if self.trials else NO_PLAN
        try:
            answer, slate = self._personal(request, at, plan, request_id, ends, steps, seen)
        except Unavailable:
            answer = self._shipped(request, plan, request_id, ends, seen)
            slate = Slate(None, len(answer.items))
        metrics.answered(answer.model_version, answer.degraded, steps.ms, plan.label)
        if self.trials:
            self.trials.after(request, at, plan, (answer, slate), partial(self._beside, at))
        return answer

    def _beside(self, at: datetime, request: RecommendationRequest, plan: Plan) -> tuple[RecommendationResponse, Slate]:
        """What a shadow would have answered, by connections that no request needs."""
        assert self.trials is not None
        assert request.request_id is not None
        beside = replace(self, store=self.trials.beside, served=None, trials=None)
        ends = Deadline.after(self.timeout_ms)
        return beside._personal(request, at, plan, request.request_id, ends, Steps(), [])

    def _personal(
        self,
        request: RecommendationRequest,
        at: datetime,
        plan: Plan,
        request_id: str,
        ends: Deadline,
        steps: Steps,
        seen: list[str],
    ) -> tuple[RecommendationResponse, Slate]:
        degraded: list[str] = []
        # One reference for the whole request, taken before anything is read: model and vectors are of one version.
        current = plan.ranker or self.models.current()
        # A read at an instant that the caller names knows of later events what training does not: it is not audited.
        audited = request.at is None and self.served is not None and self.served.samples(request.user_id)
        with steps.step("read"):
            person, features = self._read(request, at, audited, current, ends)
        if not features:
            _note(degraded, "features")
        elif request.at is None:
            metrics.features_read({name: columns.settled_at for name, columns in person.views.items()})
        seen += person.history.item_ids
        ranker = plan.ranker or self._ranker(current, person, ends, degraded)
        if plan.ranker is not None and person.champion is not None:
            self.models.follow(person.champion)  # for the others
        # A model has learned wishes as its own template writes them, whichever has won since.
        template = plan.wish_template or (ranker.manifest.wish_template if ranker else person.wish_template)
        wish_text = self._encode_wish(request.prompt, template, ranker, ends, degraded, steps)
        limit = plan.candidates or self.candidates
        asked = _Asked(request, at, person, wish_text, audited and features, features, limit)
        ranked: tuple[Candidates, NDArray[np.float32]] | None = None
        if ranker is not None:
            try:
                ranked = self._by_ranker(ranker, asked, ends, steps, degraded)
            except (Lost, Resting):
                raise  # whom nobody can reach, nobody can ask for less
            except Unavailable as error:
                logger.warning("no ranking by model %s: %s", ranker.version, error)
                ranker = None
                _note(degraded, "ranker")
        candidates, scores = ranked or self._by_floor(asked, ends, steps, degraded)
        with steps.step("re-rank"), span("re-rank", attributes={"recsys.rank.rows": len(candidates)}):
            diversity = plan.diversity(request) if candidates.vectors.shape[1] else None
            # Only a model's scores are logits, by which there is something to draw.
            drawn = plan.explore(request_id, scores, candidates.vectors, request.k, diversity) if ranker else None
            if drawn is not None:
                order = drawn.order
            elif diversity:
                order = rerank.maximal_marginal_relevance(scores, candidates.vectors, request.k, diversity)
            else:
                order = rerank.best(scores, request.k)
        if plan.missed(ranker.version if ranker else None):
            _note(degraded, ARM)
        with steps.step("explain"):
            items = self._items(order, candidates, scores, person.history, request.explain)
        if asked.audited and candidates.features_read and self.served is not None:
            self.served.offer(_served(asked, request_id, candidates, order))
        answer = RecommendationResponse(
            request_id=request_id,
            items=items,
            model_version=ranker.version if ranker else FLOOR_VERSION,
            prompt_version=template if wish_text is not None else None,
            experiment=plan.answer,
            degraded=tuple(degraded),
        )
        return answer, slate_of(candidates, scores, drawn, asked.audited)

    def _read(
        self, request: RecommendationRequest, at: datetime, audited: bool, current: Ranker | None, ends: Deadline
    ) -> tuple[PersonRow, bool]:
        """What is known of the person, and whether with features: where those cannot be read, the history alone is."""
        model = current.version if current else None
        live = request.at is None
        try:
            row = self.store.read_person(
                request.user_id, at, ends.share_ms(READ_SHARE), live=live, audited=audited, model=model
            )
        except StatementFailed:
            limit = ends.share_ms(READ_SHARE)
            return self.store.read_person(request.user_id, at, limit, live=live, model=model, features=False), False
        return row, True

    def _ranker(self, current: Ranker | None, person: PersonRow, ends: Deadline, degraded: list[str]) -> Ranker | None:
        """The model to rank with: the one in memory until the champion is; the champion, waited for, if there is none."""
        champion = person.champion
        if champion is not None and current is not None:
            if not self.models.follow(champion):
                _note(degraded, "release")
            return current
        if champion is not None:
            try:
                ranker = self.models.first(champion, ends.share_ms(MODEL_SHARE))
            except (ArtifactError, Unavailable) as error:
                logger.warning("no model to rank with: %s", error)
            else:
                if ranker.version == person.model_version:
                    return ranker
        _note(degraded, "ranker")
        return None

    def _encode_wish(
        self,
        prompt: str | None,
        template: str,
        ranker: Ranker | None,
        ends: Deadline,
        degraded: list[str],
        steps: Steps,
    ) -> NDArray[np.float32] | None:
        if prompt is None:
            return None
        try:
            with steps.step("encode wish"), span("encode wish"):
                text = prompts.render_wish(prompts.load(template), prompt)
                space = ranker.manifest.encoder_version if ranker else None
                return self.models.encode(text, ends.share_ms(MODEL_SHARE), space)
        except (ArtifactError, DefinitionError, Unavailable) as error:
            logger.error("a wish was not followed: %s", error)
            _note(degraded, "wish")
            return None

    def _by_floor(
        self, asked: _Asked, ends: Deadline, steps: Steps, degraded: list[str]
    ) -> tuple[Candidates, NDArray[np.float32]]:
        """Without a model: what is nearest to the wish; without one what people went on to, then what is trending."""
        with steps.step("candidates"):
            candidates = self._pick(asked, ends, FLOOR_SHARE, degraded)
        place = np.arange(len(candidates), 0, -1, dtype=np.float32) / max(len(candidates), 1) * 1e-3
        evidence = candidates.evidence if asked.wish_text is None else candidates.wish
        return candidates, (evidence + place).astype(np.float32)

    def _by_ranker(
        self, ranker: Ranker, asked: _Asked, ends: Deadline, steps: Steps, degraded: list[str]
    ) -> tuple[Candidates, NDArray[np.float32]]:
        wish = ranker.project(asked.wish_text[None]) if asked.wish_text is not None else None
        with steps.step("user vector"):
            inputs = person_inputs(asked.person, asked.at, wish, ranker.dim)
            if (
                not all(asked.person.views[view.name].settled for view in CONTEXT_VIEWS)
                and asked.person.history.item_ids
            ):
                _note(degraded, "features")
            user_vector, _ = self.models.run(ranker, inputs | no_candidates(ranker.dim), ends.left_ms())
        with steps.step("candidates"):
            candidates = self._pick(asked, ends, CANDIDATES_SHARE, degraded, ranker, user_vector[0])
        if not len(candidates):
            return candidates, np.zeros(0, np.float32)
        with steps.step("rank"):
            rows = candidate_inputs(candidates, asked.person.views, asked.at)
            _, scores = self.models.run(ranker, inputs | rows, ends.left_ms())
        likeness = candidates.wish if asked.wish_text is not None else None
        return candidates, rerank.follow_wish(scores[0], likeness, ranker.manifest.wish_weight)

    def _pick(
        self,
        asked: _Asked,
        ends: Deadline,
        share: float,
        degraded: list[str],
        ranker: Ranker | None = None,
        user_vector: NDArray[np.float32] | None = None,
    ) -> Candidates:
        """Candidates with their features; without them where those cannot be read."""

        def pick(features: bool) -> Candidates:
            return self.store.pick_candidates(
                at=asked.at,
                filters=asked.filters(),
                limit=asked.limit,
                timeout_ms=ends.share_ms(share),
                champion=ranker.version if ranker else None,
                dim=ranker.dim if ranker else 0,
                user_vector=user_vector,
                wish_text=asked.wish_text,
                recent=asked.recent(),
                given=asked.request.candidates,
                live=asked.request.at is None,
                audited=asked.audited,
                features=features,
            )

        try:
            picked = pick(asked.features)
        except StatementFailed:
            if not asked.features:
                raise
            picked = pick(False)
            _note(degraded, "features")
        if picked.features_read and asked.request.at is None:
            metrics.features_read({view.name: picked.features.settled_at for view in CANDIDATE_VIEWS})
        return picked

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

    def _shipped(
        self, request: RecommendationRequest, plan: Plan, request_id: str, ends: Deadline, seen: Sequence[str]
    ) -> RecommendationResponse:
        """The list that ships with the artefact, when the database cannot be asked. What the request demands holds here
        too; of what the person had, only what was read before it failed."""
        left_out = {*request.exclude, *(seen if request.candidates is None else ())}
        given = None if request.candidates is None else set(request.candidates)
        only, never = set(request.filters.categories), set(request.filters.exclude_categories)
        items = [
            RecommendedItem(
                item_id=item.item_id,
                score=item.score,
                title=item.title,
                reasons=("popular",) if request.explain else None,
            )
            for item in self.models.popular(ends.left_ms())
            if item.item_id not in left_out
            and (given is None or item.item_id in given)
            and _allowed(item.categories, only, never)
        ]
        return RecommendationResponse(
            request_id=request_id,
            items=tuple(items[: request.k]),
            model_version="popular",
            experiment=plan.answer,
            degraded=("database", ARM) if plan.assignment else ("database",),
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request with what was read for it."""

    request: RecommendationRequest
    at: datetime
    person: PersonRow
    wish_text: NDArray[np.float32] | None
    audited: bool = False
    features: bool = True
    limit: int = 500

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


def _note(degraded: list[str], rung: str) -> None:
    if rung not in degraded:
        degraded.append(rung)


def _allowed(categories: frozenset[str] | None, only: set[str], never: set[str]) -> bool:
    """Whether a filter by category lets an item through; where its categories are not known, none does."""
    if not only and not never:
        return True
    return categories is not None and not categories & never and (not only or bool(categories & only))
