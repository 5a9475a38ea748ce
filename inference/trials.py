"""What happens around an answer for the sake of experiments: a plan before it, the log and the shadows after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from inference.arms import NO_PLAN, Arms, Plan
from inference.models import LoadedModels
from inference.served import ServedLog
from inference.served_request import ServedRequest, Slate
from inference.settings import Settings
from inference.shadows import Shadows
from inference.store import Store
from inference.telemetry import span
from inference.versions import finder
from schemas.serving import RecommendationRequest, RecommendationResponse

Answered = tuple[RecommendationResponse, Slate]


@dataclass(frozen=True, slots=True)
class Trials:
    """The experiments of a process with its log, its shadows and the connection that those read by."""

    arms: Arms
    served: ServedLog
    shadows: Shadows
    beside: Store

    @classmethod
    def of(cls, settings: Settings, url: str, models: LoadedModels, served: ServedLog) -> Trials:
        """Those that `settings` name, reading from the database at `url`."""
        # Its own connection: neither a shadow nor a look into the registry must keep a request waiting.
        beside = Store(url, 1, "the database (shadows)")
        arms = Arms(settings.experiments, models.beside, finder(beside), models.current, settings.exploration)
        return cls(arms, served, Shadows(), beside)

    def plan(self, request: RecommendationRequest, at: datetime) -> Plan:
        """How to answer. A question about another instant is part of no experiment, and neither explored nor logged."""
        return self.arms.plan(request, at) if request.at is None else NO_PLAN

    def after(
        self,
        request: RecommendationRequest,
        at: datetime,
        plan: Plan,
        answered: Answered,
        compute: Callable[[RecommendationRequest, Plan], Answered],
    ) -> None:
        """Hand over an answer to be logged, and its shadows to be computed by `compute`; never waits."""
        if request.at is not None:
            return
        answer, slate = answered
        self.served.offer(ServedRequest(request.user_id, at, request.prompt, answer, slate, plan.assignment))
        for shadow in self.arms.shadows(plan):
            self.shadows.offer(partial(self._compute, request, at, shadow, answer.request_id, compute))

    def _compute(
        self,
        request: RecommendationRequest,
        at: datetime,
        plan: Plan,
        request_id: str,
        compute: Callable[[RecommendationRequest, Plan], Answered],
    ) -> None:
        # No reasons, whatever the caller wanted: nobody reads them.
        quiet = request.model_copy(update={"request_id": request_id, "explain": False, "timeout_ms": None})
        name, arm = plan.label or ("", "")
        with span("shadow", attributes={"recsys.experiment": name, "recsys.experiment.arm": arm}):
            answer, slate = compute(quiet, plan)
        self.served.offer(
            ServedRequest(request.user_id, at, request.prompt, answer, slate, plan.assignment, shadow=True)
        )

    def flush(self, timeout_ms: float) -> bool:
        """Wait until shadows are computed and everything is written, at most `timeout_ms`."""
        until = time.monotonic() + timeout_ms / 1_000
        computed = self.shadows.flush(timeout_ms)
        return self.served.flush(max(0.0, until - time.monotonic()) * 1_000) and computed

    def close(self) -> None:
        """Drop the shadows that wait, write the log, let go of the connections."""
        self.shadows.close()
        self.served.close()
        self.beside.close()
