"""What a warm process keeps: connections, the released ranker, the encoder, the shipped list. The core behind the doors."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Literal

from inference import artifacts, people
from inference.access import Access, access_of
from inference.candidates import Filters
from inference.encoder import TextEncoder
from inference.ranker import Ranker
from inference.recommend import FLOOR_VERSION, Recommender
from inference.served import ServedLog
from inference.settings import Settings, read_settings
from inference.store import Champion, Store
from schemas import prompts
from schemas.errors import ArtifactError, LarderError, RequestError, Unavailable
from schemas.manifest import CHAMPION_POINTER, ENCODER_PATH, POPULAR_ITEMS
from schemas.serving import (
    ErasureResponse,
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

logger = logging.getLogger(__name__)

CLOCK_SKEW = timedelta(minutes=5)
"""How far a sender's clock may be ahead of ours: an event further in the future is refused."""


@dataclass(slots=True)
class LoadedModels:
    """Models by version, each loaded and verified once; a release is picked up with the alias row of the next request."""

    artifacts_url: str
    threads: int = 1
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _rankers: dict[str, Ranker] = field(default_factory=dict)
    _refused: dict[str, ArtifactError] = field(default_factory=dict)
    _encoder: TextEncoder | None = None
    _popular: list[tuple[str, str, float]] | None = None

    def ranker(self, champion: Champion) -> Ranker:
        """The ranker of `champion`. Raises ArtifactError, also later, if its files cannot be trusted."""
        loaded = self._rankers.get(champion.version)
        if loaded is not None:
            return loaded
        with self._lock:
            if champion.version in self._refused:
                raise self._refused[champion.version]
            if champion.version not in self._rankers:
                try:
                    folder = artifacts.fetch(self.artifacts_url, champion.path)
                    loaded = Ranker(folder, version=champion.version, threads=self.threads)
                except ArtifactError as error:
                    logger.error("model %s cannot be used: %s", champion.version, error)
                    self._refused[champion.version] = error
                    raise
                # Only what serves stays in memory: the release before is dropped.
                self._rankers = {champion.version: loaded}
                self._popular = _read_popular(loaded.folder)
            return self._rankers[champion.version]

    def encoder(self) -> TextEncoder:
        """The wish encoder (int8). Raises ArtifactError if it is missing or changed."""
        with self._lock:
            if self._encoder is None:
                self._encoder = TextEncoder(
                    artifacts.fetch(self.artifacts_url, ENCODER_PATH), precision="int8", threads=self.threads
                )
            return self._encoder

    def popular(self) -> list[tuple[str, str, float]]:
        """`(item_id, title, score)` of the list that ships with the last release. Raises Unavailable without one."""
        if self._popular is None:
            try:
                pointer = json.loads(artifacts.get(self.artifacts_url, CHAMPION_POINTER))
                self._popular = _read_popular(artifacts.fetch(self.artifacts_url, pointer["path"]))
            except ArtifactError as error:
                raise Unavailable(
                    "the database cannot be reached or did not answer in time, and no model was released yet"
                ) from error
        return self._popular

    def loaded(self) -> Ranker | None:
        """The ranker in memory, if any."""
        return next(iter(self._rankers.values()), None)


@dataclass(slots=True)
class LarderApplication:
    """The application that every door serves; safe to share between threads."""

    settings: Settings
    store: Store
    models: LoadedModels
    recommender: Recommender
    served: ServedLog
    writer: Store
    access: Access

    @classmethod
    def from_settings(cls, settings: Settings) -> LarderApplication:
        store = Store(settings.database_url, size=settings.concurrency)
        models = LoadedModels(settings.artifacts_url, settings.threads)
        # Its own connection: what is written after an answer must not keep the next request waiting.
        writer_url = settings.writer_url or settings.database_url
        served = ServedLog(Store(writer_url, size=1), settings.audit_per_mille)
        recommender = Recommender(store, models, settings.candidates, settings.timeout_ms, served=served)
        writer = Store(writer_url, size=settings.concurrency)
        return cls(settings, store, models, recommender, served, writer, access_of(settings, store))

    def warm(self) -> None:
        """Open a connection and load what is released, so that the first request finds it there."""
        try:
            champion = self.store.ping(self.settings.timeout_ms)
            if champion is not None:
                self.models.ranker(champion)
            self.models.encoder()
        except LarderError as error:
            # Not fatal: requests will answer from a lower rung and name it.
            logger.warning("not fully warm: %s", error)

    def flush(self, timeout_ms: int) -> bool:
        """Write what was left for after the answers, within `timeout_ms`; False if it took longer."""
        return self.served.flush(timeout_ms)

    def close(self) -> None:
        """Write what waits and close every connection."""
        self.served.close()
        self.access.close()
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
                ranker = self.models.loaded()
                wording = prompts.load(ranker.manifest.wish_template if ranker else prompts.DEFAULTS["wish"])
                text = self.models.encoder().encode_one(prompts.render_wish(wording, request.text))
            except ArtifactError as error:
                raise Unavailable("the text encoder is not there; materialise text_vectors") from error
        found = self.store.similar(
            at=datetime.now(UTC),
            k=request.k,
            filters=Filters(
                categories=request.filters.categories or None, exclude_categories=request.filters.exclude_categories
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
            rows.append(event.model_dump() | {"occurred_at": min(occurred_at, arrived).isoformat()})
        new = self.writer.accept_events(rows, _timeout_ms(self.settings.timeout_ms, deadline)) if rows else set()
        outcomes: list[EventOutcome] = []
        for place, event in enumerate(request.events):
            if place in refused:
                outcomes.append(EventOutcome(event_id=event.event_id, outcome="refused", reason=refused[place]))
            else:
                outcome: Literal["stored", "duplicate"] = "stored" if event.event_id in new else "duplicate"
                new.discard(event.event_id)  # the second of two equal ids in one batch is a repeat
                outcomes.append(EventOutcome(event_id=event.event_id, outcome=outcome))
        return EventsResponse(outcomes=tuple(outcomes))

    def forget(self, user_id: str, deadline: float | None = None) -> ErasureResponse:
        return people.request_erasure(self.writer, user_id, _timeout_ms(self.settings.timeout_ms, deadline))

    def erasure(self, user_id: str, receipt_id: str, deadline: float | None = None) -> ErasureResponse:
        timeout_ms = _timeout_ms(self.settings.timeout_ms, deadline)
        return people.read_erasure(self.store, user_id, receipt_id, timeout_ms)

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
        ranker: Ranker | None = self.models.loaded()
        try:
            if champion is not None:
                ranker = self.models.ranker(champion)
            elif round_trip is not None:
                degraded.append("ranker")
        except ArtifactError:
            ranker = None
            degraded.append("ranker")
        status: Literal["ok", "degraded", "unavailable"] = "ok" if not degraded else "degraded"
        if round_trip is None:
            try:
                self.models.popular()
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


def _from_the_future(occurred_at: datetime, arrived: datetime) -> str:
    ahead = occurred_at - arrived
    return (
        f"occurred_at {occurred_at.isoformat()} is {ahead.total_seconds():,.0f} s ahead of this server's clock, at most "
        f"{CLOCK_SKEW.total_seconds():.0f} s are allowed; set the sender's clock, or leave occurred_at out to mean now"
    )


def create_application() -> LarderApplication:
    """The application that the environment describes, warm. Raises SettingsError for settings that cannot be used."""
    application = LarderApplication.from_settings(read_settings())
    application.warm()
    return application


def _timeout_ms(limit: int, deadline: float | None) -> int:
    if deadline is None:
        return limit
    left = int((deadline - time.monotonic()) * 1000)
    if left <= 0:
        raise Unavailable("the deadline passed before the database could be asked")
    return min(limit, left)


def _read_popular(folder: Path) -> list[tuple[str, str, float]]:
    file = folder / POPULAR_ITEMS
    return [(row["item_id"], row["title"], float(row["score"])) for row in json.loads(file.read_text(encoding="utf-8"))]
