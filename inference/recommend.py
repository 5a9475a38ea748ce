"""The core: one request in, one explained slate out. It knows no transport and keeps no state of its own.

    read_person ─▶ user vector ─▶ pick_candidates ─▶ rank ─▶ re-rank ─▶ explain        two database round trips

With the items in memory the three in the middle run beside each other (inference/overlap.py).

The ladder, each rung named in `degraded`: `features` (read without them), `wish-parser` (no language model in time: the
wish as it was said), `wish` (the encoder failed), `release` (the model before goes on, because the champion cannot be
loaded), `arm` (not what the person's arm of an experiment declares), `explanations` (plain reasons, nothing was tried),
`ranker` (no model), `database` (the list that ships with the artefact), then Unavailable. Beside `ranker`, `scores` says
that the person's list was scored ahead by a model (inference/ahead.py); without it co-visitation and what is trending
answer. Each step gets a share of the time that is left, so that the rungs below it have some. The rules of what may be shown
hold on every rung.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from inference import explain, metrics, rerank, shipped, timing, wishes
from inference.ahead import Ahead, ranked
from inference.arms import NO_PLAN, Plan
from inference.asked import Asked
from inference.breaker import Resting
from inference.cached_items import CachedItems
from inference.candidates import Candidates
from inference.connections import Lost, StatementFailed
from inference.deadline import CANDIDATES_SHARE, FLOOR_SHARE, MODEL_SHARE, READ_SHARE, Deadline, Pace
from inference.explain import Explained
from inference.explainer import Explainer, Ranking
from inference.item_cache import ItemCache
from inference.models import PopularItem
from inference.overlap import Overlap, Ranked
from inference.ranker import Answer, Begun, Inputs, Ranker
from inference.ranker_inputs import candidate_inputs, person_inputs
from inference.rerank import Chosen
from inference.rules import NO_RULES, Rules
from inference.served import ServedLog, ServedRead
from inference.served_request import ARM, Slate, slate_of
from inference.shipped import POPULAR_VERSION, Known
from inference.store import Champion, History, PersonRow, Store
from inference.telemetry import span
from inference.timing import Steps
from inference.trials import Trials
from inference.wish_encoding import WishEncoding
from schemas.errors import ArtifactError, Unavailable
from schemas.serving import RecommendationRequest, RecommendationResponse, RecommendedItem
from schemas.views import CANDIDATE_VIEWS, CONTEXT_VIEWS

logger = logging.getLogger(__name__)

FLOOR_VERSION = "co-visitation"


class Models(Protocol):
    """Where the core gets its models; see inference/models.py."""

    def current(self) -> Ranker | None: ...

    def follow(self, champion: Champion) -> bool: ...

    def first(self, champion: Champion, wait_ms: float) -> Ranker: ...

    def begin_ranking(self, ranker: Ranker, person: Inputs, left_ms: float) -> Begun: ...

    def finish_ranking(
        self, ranker: Ranker, begun: Begun, candidates: Inputs, left_ms: float
    ) -> NDArray[np.float32]: ...

    def run(self, ranker: Ranker, inputs: Inputs, left_ms: float, pace: Pace) -> Answer: ...

    def encode(self, text: str, left_ms: float, space: str | None = None) -> NDArray[np.float32]: ...

    def popular(self, wait_ms: float) -> Sequence[PopularItem]: ...


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
    scores_hours: int = 48
    """How old a list that was scored ahead may be; 0: none is read."""
    consent_default: bool = True
    """Whether who has said nothing of it agrees to being personalised."""
    wish_parser: wishes.Parser | None = None
    """What reads wishes, where there is a language model; who has not agreed is not told of to it."""
    rules: Rules = NO_RULES
    items: ItemCache | None = None
    """The items in memory; None: every request looks them up."""
    explainer: Explainer = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "explainer", Explainer(self.store, self.models))

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
        known = Known()
        at = request.at or self.now()
        plan = self.trials.plan(request, at) if self.trials else NO_PLAN
        try:
            answer, slate = self._personal(request, at, plan, request_id, ends, steps, known)
        except Unavailable:
            answer = self._shipped(request, plan, request_id, ends, known)
            slate = Slate(None, len(answer.items))
        if not answer.personalised:
            plan = NO_PLAN
        metrics.answered(answer.model_version, answer.degraded, steps.ms, plan.label)
        timing.tell(steps.ms)
        # While nobody can be asked whether a person agrees, what holds for those who have not said decides.
        agreed = answer.personalised and (self.consent_default or "database" not in answer.degraded)
        if self.trials and agreed:
            self.trials.after(request, at, plan, (answer, slate), partial(self._beside, at))
        return answer

    def _beside(self, at: datetime, request: RecommendationRequest, plan: Plan) -> tuple[RecommendationResponse, Slate]:
        """What a shadow would have answered, by connections that no request needs."""
        assert self.trials is not None
        assert request.request_id is not None
        beside = replace(self, store=self.trials.beside, served=None, trials=None)
        ends = Deadline.after(self.timeout_ms)
        return beside._personal(request, at, plan, request.request_id, ends, Steps(), Known())

    def _personal(
        self,
        request: RecommendationRequest,
        at: datetime,
        plan: Plan,
        request_id: str,
        ends: Deadline,
        steps: Steps,
        known: Known,
    ) -> tuple[RecommendationResponse, Slate]:
        degraded: list[str] = []
        # One reference for the whole request, taken before anything is read: model and vectors are of one version.
        current = plan.ranker or self.models.current()
        # A read at an instant that the caller names knows of later events what training does not: it is not audited.
        audited = request.at is None and self.served is not None and self.served.samples(request.user_id)
        encoding = WishEncoding(self.models, ends)
        if request.prompt is not None and self.wish_parser is None and current is not None:
            manifest = current.manifest
            encoding.begin(request.prompt, plan.wish_template or manifest.wish_template, manifest.encoder_version)
        with steps.step("read"):
            person, features = self._read(request, request_id, at, audited, current, ends)
        if not features:
            _note(degraded, "features")
        elif request.at is None:
            metrics.features_read({name: columns.settled_at for name, columns in person.views.items()})
        known.had, known.held_back = person.history.item_ids, person.held_back
        if not person.personalise:
            # Who has not agreed gets what everybody gets: nothing of theirs was read, and nothing of this is kept.
            plan = NO_PLAN
        ranker = plan.ranker or (self._ranker(current, person, ends, degraded) if person.personalise else None)
        if plan.ranker is not None and person.champion is not None:
            self.models.follow(person.champion)  # for the others
        # A model has learned wishes as its own template writes them, whichever has won since.
        template = plan.wish_template or (ranker.manifest.wish_template if ranker else person.wish_template)
        parser = self.wish_parser if person.personalise else None
        wish = wishes.understood(parser, request.prompt, ends.left_ms(), degraded, steps.step)
        space = ranker.manifest.encoder_version if ranker else None
        # Waited for where it is first wanted: until then the database can look up what hangs on no wish.
        wishing = cache(lambda: encoding.vector(wish, template, space, degraded, steps.step))
        audited = audited and features and person.personalise
        limit = plan.candidates or self.candidates
        asked = Asked(request, at, person, self.rules, wishing, audited, features, limit, wish)
        by_ranker: tuple[Candidates, NDArray[np.float32], Inputs] | None = None
        if ranker is not None:
            try:
                by_ranker = self._by_ranker(ranker, asked, ends, steps, degraded)
            except (Lost, Resting):
                raise  # whom nobody can reach, nobody can ask for less
            except Unavailable as error:
                logger.warning("no ranking by model %s: %s", ranker.version, error)
                ranker = None
                _note(degraded, "ranker")
        candidates, scores, inputs = by_ranker or (*self._by_floor(asked, ends, steps, degraded), None)
        with steps.step("re-rank"), span("re-rank", attributes={"recsys.rank.rows": len(candidates)}):
            diversity = plan.diversity(request) if candidates.vectors.shape[1] else None
            limits = self.rules.limits(candidates.groups, request.k)
            # Only a model's scores are logits, by which there is something to draw; and what is drawn knows no rules.
            drawable = ranker is not None and limits is None
            drawn = plan.explore(request_id, scores, candidates.vectors, request.k, diversity) if drawable else None
            chosen = (
                Chosen(drawn.order)
                if drawn is not None
                else rerank.choose(
                    scores,
                    request.k,
                    vectors=candidates.vectors if candidates.vectors.shape[1] else None,
                    diversity=diversity or 0.0,
                    limits=limits,
                )
            )
            order = chosen.order
        if plan.missed(ranker.version if ranker else None):
            _note(degraded, ARM)
        with steps.step("explain"):
            why: list[Explained] | None = None
            if request.explain:
                words = wish.look_for if wish is not None and asked.wish_text is not None else None
                ranking = ranker and inputs and Ranking(ranker, inputs, candidates, scores, person.history, at, words)
                why = self._explain(order, candidates, person.history, ranking or None, words, ends, degraded)
            items = _items(order, candidates, scores, why)
        if asked.audited and candidates.features_read and self.served is not None:
            self.served.offer(_served(asked, request_id, candidates, order))
        answer = RecommendationResponse(
            request_id=request_id,
            items=items,
            model_version=(ranker.version if ranker else candidates.ahead_version or FLOOR_VERSION)
            if person.personalise
            else POPULAR_VERSION,
            prompt_version=wishes.version_of(template, wish, asked.wish_text is not None),
            experiment=plan.answer,
            degraded=tuple(degraded),
            personalised=person.personalise,
            rules=self.rules.notes(chosen, shipped.wanted(request), held_back=len(person.held_back)),
        )
        return answer, slate_of(candidates, scores, drawn, asked.audited)

    def _read(
        self,
        request: RecommendationRequest,
        request_id: str,
        at: datetime,
        audited: bool,
        current: Ranker | None,
        ends: Deadline,
    ) -> tuple[PersonRow, bool]:
        """What is known of the person, and whether with features: where those cannot be read, the history alone is."""
        read = partial(
            self.store.read_person,
            request.user_id,
            at,
            live=request.at is None,
            model=current.version if current else None,
            unless_said=self.consent_default,
            held_days=self.rules.not_again_days,
            request_id=request_id,
        )
        try:
            row = read(ends.share_ms(READ_SHARE), audited=audited)
        except StatementFailed:
            return read(ends.share_ms(READ_SHARE), features=False), False
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

    def _by_floor(
        self, asked: Asked, ends: Deadline, steps: Steps, degraded: list[str]
    ) -> tuple[Candidates, NDArray[np.float32]]:
        """Without a model: what is nearest to the wish; without one the list that was scored ahead, then what people went
        on to, then what is trending."""
        with steps.step("candidates"):
            ahead = self._ahead(asked)
            try:
                candidates = self._pick(asked, ends, FLOOR_SHARE, degraded, ahead=ahead)
            except StatementFailed:
                if ahead is None:
                    raise
                candidates = self._pick(asked, ends, FLOOR_SHARE, degraded)
        place = np.arange(len(candidates), 0, -1, dtype=np.float32) / max(len(candidates), 1) * 1e-3
        evidence = candidates.evidence if asked.wish_text is None else candidates.wish
        scores = (evidence + place).astype(np.float32)
        if candidates.ahead_version is None or candidates.ahead is None:
            return candidates, scores
        _note(degraded, "scores")
        return candidates, ranked(candidates.ahead, scores)

    def _ahead(self, asked: Asked) -> Ahead | None:
        """Which list to fall back on: none knows of wishes, of what callers name, or what it will say at another instant."""
        request = asked.request
        if not self.scores_hours or request.at is not None or request.candidates is not None:
            return None
        if asked.wish_text is not None or not asked.person.personalise:
            return None
        return Ahead(request.user_id, asked.at - timedelta(hours=self.scores_hours))

    def _by_ranker(
        self, ranker: Ranker, asked: Asked, ends: Deadline, steps: Steps, degraded: list[str]
    ) -> tuple[Candidates, NDArray[np.float32], Inputs]:
        if not all(asked.person.views[view.name].settled for view in CONTEXT_VIEWS) and asked.person.history.item_ids:
            _note(degraded, "features")

        def begin() -> Begun:
            text = asked.wish_text
            with steps.step("user vector"):
                wish = ranker.project(text[None]) if text is not None else None
                inputs = person_inputs(asked.person, asked.at, wish, ranker.dim)
                return self.models.begin_ranking(ranker, inputs, ends.left_ms())

        begun: Begun | None = None
        ranked: Ranked | None = None
        items = self._cached(ranker, asked)
        filters = asked.filters()
        if items is not None and asked.in_parts and filters.by_ids:
            overlap = Overlap(
                self.models,
                ranker,
                items,
                asked.person.views,
                asked.at,
                asked.limit,
                filters,
                asked.recent(),
                asked.wishing if asked.request.prompt is not None else None,
                ends.left_ms,
                steps.step,
                begin,
            )
            # A statement that fails is asked again below with all the others, and for less where that fails too.
            with steps.step("candidates"), suppress(StatementFailed):
                ranked = overlap.run(self.store, ends.share_ms(CANDIDATES_SHARE))
            begun = overlap.begun
        if ranked is not None:
            _tell_ages(ranked.candidates, asked)
        else:
            begun = begun or begin()
            with steps.step("candidates"):
                candidates = self._pick(
                    asked, ends, CANDIDATES_SHARE, degraded, ranker, begun.user_vector[0], items=items
                )
            rows: Inputs = {}
            scores = np.zeros(0, np.float32)
            if len(candidates):
                with steps.step("rank"):
                    rows = candidate_inputs(candidates, asked.person.views, asked.at)
                    scores = self.models.finish_ranking(ranker, begun, rows, ends.left_ms())[0]
            ranked = Ranked(candidates, rows, scores)
        assert begun is not None
        likeness = ranked.candidates.wish if asked.wish_text is not None else None
        scores = rerank.follow_wish(ranked.scores, likeness, ranker.manifest.wish_weight)
        return ranked.candidates, scores, {**begun.inputs, **ranked.inputs}

    def _pick(
        self,
        asked: Asked,
        ends: Deadline,
        share: float,
        degraded: list[str],
        ranker: Ranker | None = None,
        user_vector: NDArray[np.float32] | None = None,
        ahead: Ahead | None = None,
        items: CachedItems | None = None,
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
                ahead=ahead,
                items=items,
            )

        try:
            picked = pick(asked.features)
        except StatementFailed:
            if not asked.features:
                raise
            picked = pick(False)
            _note(degraded, "features")
        _tell_ages(picked, asked)
        return picked

    def _cached(self, ranker: Ranker, asked: Asked) -> CachedItems | None:
        """The items in memory, if they are there and of the model."""
        # Of the model that serves everybody: an arm's or a shadow's would take its place in memory and give it back again.
        if self.items is None or asked.request.at is not None or ranker is not self.models.current():
            return None
        return self.items.get(asked.person.catalogue, ranker.version, ranker.dim)

    def _explain(
        self,
        order: NDArray[np.int64],
        candidates: Candidates,
        history: History,
        ranking: Ranking | None,
        wish: str | None,
        ends: Deadline,
        degraded: list[str],
    ) -> list[Explained]:
        """Why each shown item is: what was tried of it by the ranker; plain reasons on the floor, or without the time."""
        if ranking is not None:
            try:
                return self.explainer.explain(ranking, order, ends)
            except (ArtifactError, Unavailable) as error:
                logger.warning("a slate is explained by likeness alone: %s", error)
                _note(degraded, "explanations")
        return explain.plain_slate(candidates, order, history, wish)

    def _shipped(
        self, request: RecommendationRequest, plan: Plan, request_id: str, ends: Deadline, known: Known
    ) -> RecommendationResponse:
        """The list that ships with the artefact, when the database cannot be asked."""
        answer = shipped.answer(request, request_id, self.models.popular(ends.left_ms()), self.rules, known)
        if plan.assignment is None:
            return answer
        return answer.model_copy(update={"experiment": plan.answer, "degraded": (*answer.degraded, ARM)})


def _items(
    order: NDArray[np.int64], candidates: Candidates, scores: NDArray[np.float32], why: list[Explained] | None
) -> tuple[RecommendedItem, ...]:
    return tuple(
        RecommendedItem(
            item_id=candidates.item_ids[index],
            score=float(scores[index]),
            title=candidates.titles[index],
            reasons=why[place].reasons if why else None,
            because=why[place].because if why else None,
        )
        for place, index in enumerate(order.tolist())
    )


def _served(asked: Asked, request_id: str, candidates: Candidates, order: NDArray[np.int64]) -> ServedRead:
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


def _tell_ages(candidates: Candidates, asked: Asked) -> None:
    if candidates.features_read and asked.request.at is None:
        metrics.features_read({view.name: candidates.features.settled_at for view in CANDIDATE_VIEWS})


def _note(degraded: list[str], rung: str) -> None:
    if rung not in degraded:
        degraded.append(rung)
