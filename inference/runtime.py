"""What a warm process keeps, and the core behind the doors: every route's work, on stores, models and a log of what was served."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata
from typing import Literal

from inference import metrics, people, readings, request_log, survey, telemetry, wishes
from inference.access import Access, access_of
from inference.breaker import Breaker
from inference.candidates import Filters
from inference.deadline import Deadline
from inference.item_cache import ItemCache
from inference.models import LoadedModels
from inference.pseudonyms import Pseudonyms
from inference.recommend import FLOOR_VERSION, Recommender
from inference.rules import read_rules
from inference.served import ServedLog
from inference.settings import Settings, read_settings
from inference.store import Champion, Store
from inference.trials import Trials
from schemas import prompts
from schemas.errors import ArtifactError, LarderError, RequestError, Unavailable
from schemas.serving import (
    EventOutcome,
    EventsRequest,
    EventsResponse,
    HealthResponse,
    RecommendationRequest,
    RecommendationResponse,
    RecommendedItem,
    SimilarRequest,
    SimilarResponse,
)
from schemas.serving_people import (
    ConsentRequest,
    ConsentResponse,
    ErasureResponse,
    ExportResponse,
    HistoryResponse,
    PeopleResponse,
    SurveyOutcome,
    SurveyQuestions,
    SurveyRequest,
)

logger = logging.getLogger(__name__)

CLOCK_SKEW = timedelta(minutes=5)
"""How far a sender's clock may be ahead of ours: an event further in the future is refused."""
_WARM_MS = 60_000
"""What a start may wait for a model: before the first request nobody has a deadline."""
_WRITE_BEFORE_SNAPSHOT_MS = 5_000


@dataclass(slots=True)
class LarderApplication:
    """The application that every door serves; safe to share between threads."""

    settings: Settings
    store: Store
    """Reads: of the replica, where one is set."""
    writer: Store
    models: LoadedModels
    recommender: Recommender
    served: ServedLog
    trials: Trials
    access: Access
    items: ItemCache
    unwatch: Callable[[], None] = lambda: None
    """Ends the readings that metrics take of this application."""

    @classmethod
    def from_settings(cls, settings: Settings) -> LarderApplication:
        rules = read_rules(settings.rules)
        store = Store(settings.database_read_url or settings.database_url, settings.concurrency)
        writer_url = settings.writer_url or settings.database_url
        writer = Store(writer_url, settings.concurrency, "the database (writes)")
        models = LoadedModels(settings.artifacts_url, settings.threads)
        # Its own connection: what is written after an answer must not keep the next request waiting.
        served = ServedLog(Store(writer_url, 1, "the database (log)"), settings.audit_per_mille)
        trials = Trials.of(settings, store.url, models, served)
        unwatch = readings.watch(models, served, trials.shadows)
        items = ItemCache(store.url, settings.item_cache)
        recommender = Recommender(
            store,
            models,
            settings.candidates,
            settings.timeout_ms,
            served=served,
            trials=trials,
            scores_hours=settings.scores_hours,
            consent_default=settings.consent_default,
            wish_parser=_parser(settings, store),
            rules=rules,
            items=items,
        )
        access = access_of(settings, store)
        return cls(settings, store, writer, models, recommender, served, trials, access, items, unwatch)

    def warm(self) -> None:
        """Open a connection and load what is released, side by side, so that the first request finds it there."""
        self.models.begin()
        try:
            champion = self.store.ping(self.settings.timeout_ms)
            if champion is not None:
                self.models.first(champion, _WARM_MS)
            self.models.finish(_WARM_MS)
        except LarderError as error:
            # Not fatal: requests will answer from a lower rung and name it.
            logger.warning("not fully warm: %s", error)

    def before_snapshot(self) -> None:
        """Let go of all that must not be in a snapshot of this process: connections, spans that wait, threads that work.

        What is loaded stays: it is what the snapshot is for.
        """
        self.trials.flush(_WRITE_BEFORE_SNAPSHOT_MS)
        self.items.wait(_WRITE_BEFORE_SNAPSHOT_MS / 1_000)
        self._disconnect()
        telemetry.before_snapshot()

    def after_restore(self) -> None:
        """Begin a new life: every copy of the snapshot opens its own connection and draws its own random numbers.

        Ids come from the system's generator and need nothing; the seeded one is seeded anew for whoever uses it.
        """
        random.seed()
        self._disconnect()
        self.items.restored()
        for breaker in self.models.breakers():
            breaker.reset()
        try:
            self.store.ping(self.settings.timeout_ms)
        except LarderError as error:
            logger.warning("not fully warm after a restore: %s", error)

    def breakers(self) -> tuple[Breaker, ...]:
        """One per dependency, for metrics."""
        return *(store.breaker for store in self._stores()), *self.models.breakers()

    def _disconnect(self) -> None:
        for store in self._stores():
            store.restored()

    def _stores(self) -> tuple[Store, ...]:
        return self.store, self.writer, self.served.store, self.trials.beside

    def flush(self, timeout_ms: int) -> bool:
        """Write what was left for after the answers, within `timeout_ms`; False if it took longer."""
        return self.trials.flush(timeout_ms)

    def close(self) -> None:
        """Write what waits and close every connection."""
        self.unwatch()
        self.trials.close()
        self.access.close()
        self.items.close()
        self.writer.close()
        self.store.close()

    def recommend(
        self, request: RecommendationRequest, deadline: float | None = None, carrier: Mapping[str, str] | None = None
    ) -> RecommendationResponse:
        return self.recommender.recommend(request, deadline)

    def similar(
        self, request: SimilarRequest, deadline: float | None = None, carrier: Mapping[str, str] | None = None
    ) -> SimilarResponse:
        text = None
        if request.text is not None:
            try:
                ranker = self.models.current()
                wording = prompts.load(ranker.manifest.wish_template if ranker else prompts.DEFAULTS["wish"])
                limit = _timeout_ms(self.settings.timeout_ms, deadline)
                text = self.models.encode(prompts.render_wish(wording, request.text), limit)
            except ArtifactError as error:
                raise Unavailable("the text encoder is not there; materialise text_vectors") from error
        found = self.store.similar(
            at=datetime.now(UTC),
            k=request.k,
            filters=Filters(
                categories=request.filters.categories or None,
                exclude_categories=request.filters.exclude_categories,
                where=self.recommender.rules.where(request.filters.where),
            ),
            item_id=request.item_id,
            text=text,
            timeout_ms=_timeout_ms(self.settings.timeout_ms, deadline),
        )
        if found is None:
            raise RequestError(
                f"there is no item {request.item_id!r} with a text; look up its id in the catalogue, or send text instead",
                status=404,
                field="item_id",
            )
        return SimilarResponse(
            items=tuple(RecommendedItem(item_id=item_id, title=title, score=score) for item_id, title, score in found)
        )

    def accept_events(
        self, request: EventsRequest, deadline: float | None = None, carrier: Mapping[str, str] | None = None
    ) -> EventsResponse:
        arrived = datetime.now(UTC)
        rows: list[dict[str, object]] = []
        refused: dict[int, str] = {}
        for place, event in enumerate(request.events):
            occurred_at = event.occurred_at or arrived
            if occurred_at - arrived > CLOCK_SKEW:
                refused[place] = _from_the_future(occurred_at, arrived)
                continue
            # Nothing happens after it arrived: a clock that runs a little ahead must not put an event into a window
            # that has not begun, nor a read count what is yet to come.
            more = {"occurred_at": min(occurred_at, arrived).isoformat(), "unless_said": self.settings.consent_default}
            rows.append(event.model_dump() | more)
        new = self.writer.accept_events(rows, _timeout_ms(self.settings.timeout_ms, deadline)) if rows else set()
        declined = self._declined(request, new, refused, deadline)
        outcomes: list[EventOutcome] = []
        for place, event in enumerate(request.events):
            if place in refused:
                outcomes.append(EventOutcome(event_id=event.event_id, outcome="refused", reason=refused[place]))
            elif place in declined:
                outcomes.append(EventOutcome(event_id=event.event_id, outcome="declined", reason=people.DECLINED))
            else:
                outcome: Literal["stored", "duplicate"] = "stored" if event.event_id in new else "duplicate"
                new.discard(event.event_id)  # the second of two equal ids in one batch is a repeat
                outcomes.append(EventOutcome(event_id=event.event_id, outcome=outcome))
        metrics.events_posted(made.outcome for made in outcomes)
        return EventsResponse(outcomes=tuple(outcomes))

    def _declined(
        self, request: EventsRequest, new: set[str], refused: Mapping[int, str], deadline: float | None
    ) -> set[int]:
        """The places of the events that were not stored because their people are not personalised."""
        left = {
            place: event.user_id
            for place, event in enumerate(request.events)
            if event.event_id not in new and place not in refused
        }
        if not left:
            return set()
        default = self.settings.consent_default
        timeout_ms = _timeout_ms(self.settings.timeout_ms, deadline)
        without = people.without_consent(self.writer, left.values(), default, timeout_ms)
        return {place for place, user_id in left.items() if user_id in without}

    def forget(self, user_id: str, deadline: float | None = None) -> ErasureResponse:
        return people.request_erasure(self.writer, user_id, _timeout_ms(self.settings.timeout_ms, deadline))

    def erasure(self, user_id: str, receipt_id: str, deadline: float | None = None) -> ErasureResponse:
        timeout_ms = _timeout_ms(self.settings.timeout_ms, deadline)
        return people.read_erasure(self.store, user_id, receipt_id, timeout_ms)

    def history(self, user_id: str, limit: int, deadline: float | None = None) -> HistoryResponse:
        return people.read_history(self.store, user_id, limit, _timeout_ms(self.settings.timeout_ms, deadline))

    def some_people(self, deadline: float | None = None) -> PeopleResponse:
        return people.some_people(self.store, _timeout_ms(self.settings.timeout_ms, deadline))

    def survey_questions(self, user_id: str, deadline: float | None = None) -> SurveyQuestions:
        timeout_ms = _timeout_ms(self.settings.timeout_ms, deadline)
        return survey.questions(self.store, user_id, datetime.now(UTC), self.settings.survey_per_mille, timeout_ms)

    def answer_survey(self, request: SurveyRequest, deadline: float | None = None) -> SurveyOutcome:
        return survey.accept(self.writer, request, _timeout_ms(self.settings.timeout_ms, deadline))

    def consent(self, user_id: str, request: ConsentRequest, deadline: float | None = None) -> ConsentResponse:
        timeout_ms = _timeout_ms(self.settings.timeout_ms, deadline)
        return people.set_consent(self.writer, user_id, request.personalise, timeout_ms)

    def export(self, user_id: str, receipt_id: str | None, deadline: float | None = None) -> ExportResponse:
        timeout_ms = _timeout_ms(self.settings.timeout_ms, deadline)
        if receipt_id is None:
            return people.request_export(self.writer, user_id, timeout_ms)
        return people.read_export(self.store, user_id, receipt_id, timeout_ms)

    def health(self) -> HealthResponse:
        degraded: list[str] = []
        start = time.perf_counter()
        round_trip: float | None = None
        champion: Champion | None = None
        try:
            champion = self.store.ping(self.settings.timeout_ms)
            round_trip = (time.perf_counter() - start) * 1000
        except Unavailable:
            degraded.append("database")
        if champion is not None and self.models.current() is not None:
            if not self.models.follow(champion):
                degraded.append("release")
        elif champion is not None:
            try:
                self.models.first(champion, self.settings.timeout_ms)
            except (ArtifactError, Unavailable):
                degraded.append("ranker")
        elif round_trip is not None:
            degraded.append("ranker")
        if self.trials.arms.troubled():
            degraded.append("experiments")
        ranker = None if "ranker" in degraded else self.models.current()
        status: Literal["ok", "degraded", "unavailable"] = "ok" if not degraded else "degraded"
        if round_trip is None:
            try:
                self.models.popular(self.settings.timeout_ms)
            except Unavailable:
                status = "unavailable"
        age = None
        if ranker is not None:
            trained = datetime.fromisoformat(ranker.manifest.trained_until)
            age = (datetime.now(UTC) - trained).total_seconds()
        return HealthResponse(
            status=status,
            version=metadata.version("larder"),
            model_version=ranker.version if ranker else FLOOR_VERSION,
            model_age_seconds=age,
            encoder_version=ranker.manifest.encoder_version if ranker else None,
            provider=ranker.provider if ranker else None,
            database_round_trip_ms=round_trip,
            degraded=tuple(degraded),
        )


def _parser(settings: Settings, store: Store) -> wishes.Parser | None:
    if not settings.llm_url:
        return None
    from inference.wish_parser import open_parser  # only where there is a language model

    return open_parser(settings, store)


def _from_the_future(occurred_at: datetime, arrived: datetime) -> str:
    ahead = occurred_at - arrived
    return (
        f"occurred_at {occurred_at.isoformat()} is {ahead.total_seconds():,.0f} s ahead of this server's clock, at most "
        f"{CLOCK_SKEW.total_seconds():.0f} s are allowed; set the sender's clock, or leave occurred_at out to mean now"
    )


def create_application(settings: Settings | None = None) -> LarderApplication:
    """The application of `settings`, those of the environment by default, warm. Raises SettingsError if they cannot be used."""
    settings = settings or read_settings()
    request_log.open_log(settings.request_log, Pseudonyms.read(settings.log_keys))
    application = LarderApplication.from_settings(settings)
    application.warm()
    metrics.initialised()
    return application


def _timeout_ms(limit: int, deadline: float | None) -> float:
    return limit if deadline is None else min(limit, Deadline(deadline).share_ms(1.0))
