"""A small real Application for the tests of the doors: no database, no model, the same answer every time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime

from inference.access import Access, Platform
from schemas.errors import Unavailable
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


class SmallApplication:
    """Recommends numbered items; some people are special so that tests can ask for trouble."""

    def __init__(self) -> None:
        self.carriers: list[dict[str, str]] = []
        self.remaining_seconds: list[float | None] = []
        self.closed = False
        self.access: Access = Platform()

    def recommend(
        self, request: RecommendationRequest, deadline: float | None, carrier: Mapping[str, str]
    ) -> RecommendationResponse:
        self.carriers.append(dict(carrier))
        self.remaining_seconds.append(None if deadline is None else deadline - time.monotonic())
        if request.user_id == "broken":
            raise ZeroDivisionError(f"secret of {request.prompt}")
        if request.user_id == "nobody-home":
            raise Unavailable("the popular list is missing; release a model", retry_after_seconds=7)
        if request.user_id == "deadline":
            left = self.remaining_seconds[-1]
            return RecommendationResponse(request_id="none" if left is None else f"{left:.1f}", items=())
        if request.user_id == "carrier":
            return RecommendationResponse(request_id=carrier.get("x-amzn-trace-id", "none"), items=())
        if request.user_id == "slow":
            time.sleep(1.0)
        items = tuple(
            RecommendedItem(
                item_id=f"i{n}", score=1 / (n + 3), title=f"Größe {n}", reasons=("new",) if request.explain else None
            )
            for n in range(request.k)
        )
        return RecommendationResponse(request_id=request.request_id or "made-up", items=items, model_version="m1")

    def similar(self, request: SimilarRequest, deadline: float | None, carrier: Mapping[str, str]) -> SimilarResponse:
        return SimilarResponse(items=(RecommendedItem(item_id=f"like {request.item_id}", score=1.0, title="t"),))

    def accept_events(
        self, request: EventsRequest, deadline: float | None, carrier: Mapping[str, str]
    ) -> EventsResponse:
        return EventsResponse(
            outcomes=tuple(EventOutcome(event_id=event.event_id, outcome="stored") for event in request.events)
        )

    def forget(self, user_id: str, deadline: float | None) -> ErasureResponse:
        return ErasureResponse(receipt_id=f"of {user_id}", state="waiting")

    def erasure(self, user_id: str, receipt_id: str, deadline: float | None) -> ErasureResponse:
        return ErasureResponse(receipt_id=receipt_id, state="finished", removed={"events": len(user_id)})

    def history(self, user_id: str, limit: int, deadline: float | None) -> HistoryResponse:
        return HistoryResponse(events=())

    def some_people(self, deadline: float | None) -> PeopleResponse:
        return PeopleResponse(people=("u1",))

    def survey_questions(self, user_id: str, deadline: float | None) -> SurveyQuestions:
        return SurveyQuestions()

    def answer_survey(self, request: SurveyRequest, deadline: float | None) -> SurveyOutcome:
        return SurveyOutcome(stored=len(request.answers))

    def consent(self, user_id: str, request: ConsentRequest, deadline: float | None) -> ConsentResponse:
        return ConsentResponse(personalise=request.personalise, decided_at=datetime(2030, 1, 1, tzinfo=UTC))

    def export(self, user_id: str, receipt_id: str | None, deadline: float | None) -> ExportResponse:
        held = {"public.people": [{"user_id": user_id}]}
        return ExportResponse(receipt_id=receipt_id or f"of {user_id}", state="waiting", held=held)

    def health(self) -> HealthResponse:
        return HealthResponse(status="ok", version="1")

    def close(self) -> None:
        self.closed = True
