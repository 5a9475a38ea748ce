"""What experiments mean for one request: the arm's model and settings, and which shadows are computed beside its answer.

The declarations are read anew when their file has changed, by a thread of its own: a request only says that it came.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from inference.declared import Declared
from inference.experiment import Arm, Assignment, Experiment, assign, versions
from inference.explore import POOL, Drawn, draw, explores
from inference.ranker import Ranker
from inference.versions import Find, Versions
from schemas.errors import DefinitionError
from schemas.serving import ExperimentArm, RecommendationRequest

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How one request is to be answered. None: as without experiments."""

    assignment: Assignment | None = None
    ranker: Ranker | None = None
    """The arm's model, where it names one and it is there."""
    exploration: float = 0.0

    @property
    def arm(self) -> Arm | None:
        return self.assignment.arm if self.assignment else None

    @property
    def wish_template(self) -> str | None:
        return self.assignment.arm.wish_template if self.assignment else None

    @property
    def candidates(self) -> int | None:
        return self.assignment.arm.candidates if self.assignment else None

    def diversity(self, request: RecommendationRequest) -> float | None:
        """What the request says, else what the arm does."""
        if request.diversity is not None or self.assignment is None:
            return request.diversity
        return self.assignment.arm.diversity

    @property
    def answer(self) -> ExperimentArm | None:
        """What the answer says of it."""
        if self.assignment is None:
            return None
        return ExperimentArm(name=self.assignment.experiment.name, arm=self.assignment.arm.name)

    @property
    def label(self) -> tuple[str, str] | None:
        """Experiment and arm, for metrics: only names that were declared."""
        return (self.assignment.experiment.name, self.assignment.arm.name) if self.assignment else None

    def explore(
        self,
        request_id: str,
        scores: NDArray[np.float32],
        vectors: NDArray[np.float32],
        k: int,
        diversity: float | None,
    ) -> Drawn | None:
        """A slate drawn at random, for a request whose turn it is; `scores (n,)`, `vectors (n, d)`."""
        if not self.exploration or k > POOL or not explores(request_id, self.exploration):
            return None
        return draw(request_id, scores, k, vectors, diversity or 0.0)

    def missed(self, answered_by: str | None) -> bool:
        """Whether an answer of that model, None: of none, is not what the arm declares."""
        arm = self.arm
        if arm is None:
            return False
        if answered_by is None:
            return any(value is not None for value in (arm.model_version, arm.diversity, arm.exploration))
        return arm.model_version is not None and arm.model_version != answered_by


NO_PLAN = Plan()


class Arms:
    """The experiments of a process. Safe between threads."""

    def __init__(
        self,
        file: str,
        beside: Versions,
        find: Find,
        champion: Callable[[], Ranker | None],
        exploration: float = 0.0,
    ) -> None:
        """`file` empty: there are no experiments. `exploration` holds for requests whose arm says none."""
        self.fault: str | None = None
        """Why the file cannot be used as it is; what it said before goes on."""
        self._declared = Declared(file) if file else None
        self._beside = beside
        self._find = find
        self._champion = champion
        self._outside = replace(NO_PLAN, exploration=exploration)
        self._experiments: tuple[Experiment, ...] = ()
        self._next_check = 0.0
        self._wake = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        if self._declared is not None:
            self.check()

    @property
    def experiments(self) -> tuple[Experiment, ...]:
        """As they were declared last without a fault."""
        return self._experiments

    def plan(self, request: RecommendationRequest, at: datetime) -> Plan:
        """What holds for a request that asks for now."""
        if self._declared is not None and time.monotonic() >= self._next_check:
            self._look(self._declared)
        assigned = assign(self._experiments, request.user_id, at) if self._experiments else None
        if assigned is None or says_itself(request, assigned.experiment):
            return self._outside
        exploration = assigned.arm.exploration
        return Plan(
            assigned,
            self._ranker(assigned.arm),
            self._outside.exploration if exploration is None else exploration,
        )

    def shadows(self, plan: Plan) -> Sequence[Plan]:
        """What is to be computed beside an answer by `plan`: of the shadows of its experiment those that can be."""
        if plan.assignment is None:
            return ()
        experiment = plan.assignment.experiment
        found = [Plan(Assignment(experiment, arm), self._ranker(arm)) for arm in experiment.shadows]
        return [each for each in found if each.ranker is not None or (each.arm and each.arm.model_version is None)]

    def troubled(self) -> bool:
        """Whether the file has a fault, or a version that it names cannot be loaded."""
        return self.fault is not None or bool(self._beside.refused())

    def check(self) -> None:
        """Read the file if it is another than last time."""
        assert self._declared is not None
        try:
            declared = self._declared.changed()
        except DefinitionError as error:
            logger.error("experiments: %s; what was declared before goes on", error)
            self.fault = str(error)
            return
        if declared is None:
            return
        if declared != self._experiments or self.fault is not None:
            logger.info("experiments: %s", ", ".join(each.name for each in declared) or "none")
        self.fault = None
        # Loading begins before the first request asks: who is there first should not be answered by the champion.
        self._beside.keep(versions(declared, datetime.now(UTC)), self._find)
        self._experiments = declared

    def _ranker(self, arm: Arm) -> Ranker | None:
        if arm.model_version is None:
            return None
        champion = self._champion()
        if champion is not None and champion.version == arm.model_version:
            return champion
        return self._beside.get(arm.model_version)

    def _look(self, declared: Declared) -> None:
        self._next_check = time.monotonic() + declared.check_seconds
        # Started with a request, not before: a process may be frozen or forked until then.
        if self._thread is None or not self._thread.is_alive():
            with self._starting:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._watch, name="larder-experiments", daemon=True)
                    self._thread.start()
        self._wake.set()

    def _watch(self) -> None:
        while True:
            if not self._wake.wait(_IDLE_SECONDS):
                return  # nobody asks any more; who comes next starts another
            self._wake.clear()
            try:
                self.check()
            except Exception as error:  # noqa: BLE001 - a thread that dies would leave a change unseen
                logger.error("the experiments' file could not be looked at: %s", type(error).__name__)


def says_itself(request: RecommendationRequest, experiment: Experiment) -> bool:
    """Whether a request decides itself what the experiment's arms differ in; then it is part of none of them."""
    return (request.diversity is not None and experiment.varies("diversity")) or (
        request.candidates is not None and experiment.varies("candidates")
    )
