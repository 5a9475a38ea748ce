"""The core behind a deployed function of the tests: answers with one model, well or badly as it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from inference.access import Access, Platform
from schemas.errors import Unavailable
from schemas.serving import (
    EventsRequest,
    EventsResponse,
    HealthResponse,
    RecommendationRequest,
    RecommendationResponse,
    RecommendedItem,
    SimilarRequest,
    SimilarResponse,
)
from schemas.serving_people import ErasureResponse


@dataclass
class SmokeApplication:
    """`breaks_after` answers it is degraded; it always is if `degraded` names something."""

    model: str
    items: int = 3
    degraded: tuple[str, ...] = ()
    fails: bool = False
    breaks_after: int | None = None
    answered: int = 0
    access: Access = field(default_factory=Platform)

    def recommend(
        self, request: RecommendationRequest, deadline: float | None, carrier: Mapping[str, str]
    ) -> RecommendationResponse:
        if self.fails:
            raise Unavailable("the database cannot be reached")
        self.answered += 1
        broken = self.breaks_after is not None and self.answered > self.breaks_after
        return RecommendationResponse(
            request_id="r",
            items=tuple(RecommendedItem(item_id=f"i{n}", score=1.0, title="t") for n in range(self.items)),
            model_version=self.model,
            degraded=("ranker",) if broken else self.degraded,
        )

    def similar(self, request: SimilarRequest, deadline: float | None, carrier: Mapping[str, str]) -> SimilarResponse:
        return SimilarResponse(items=())

    def accept_events(
        self, request: EventsRequest, deadline: float | None, carrier: Mapping[str, str]
    ) -> EventsResponse:
        return EventsResponse(outcomes=())

    def forget(self, user_id: str, deadline: float | None) -> ErasureResponse:
        return ErasureResponse(receipt_id="0" * 32, state="waiting")

    def erasure(self, user_id: str, receipt_id: str, deadline: float | None) -> ErasureResponse:
        return ErasureResponse(receipt_id=receipt_id, state="waiting")

    def health(self) -> HealthResponse:
        return HealthResponse(status="ok", version="1", model_version=self.model)
