"""What experiments.toml declares, as far as the analysis needs it: who is compared with whom, by which metrics, since when.

The file is read, and people are assigned, by `inference.experiment`. What an arm changes is no concern of the analysis, but
for the model version and the wish template, which it names and can take back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from inference.declared import read
from inference.experiment import read_experiments
from orchestration.compute.experiments.metrics import Metric, metrics
from schemas.errors import DefinitionError

CONTROL = "control"
"""The arm of this name is what others are compared with; without one it is the first that is shown."""


class DeclaredArm(Protocol):
    """An arm as whoever assigns people knows it."""

    @property
    def name(self) -> str: ...
    @property
    def share(self) -> float: ...
    @property
    def model_version(self) -> str | None: ...
    @property
    def wish_template(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm; a share of 0 is a shadow: scored and logged, never shown."""

    name: str
    share: float
    model_version: str | None = None
    wish_template: str | None = None


@dataclass(frozen=True, slots=True)
class Experiment:
    """One declaration. `arms` are those that are shown, control first, their shares sum to 1; `shadows` the others."""

    name: str
    start: datetime
    end: datetime | None
    arms: tuple[Arm, ...]
    shadows: tuple[Arm, ...]
    metrics: tuple[Metric, ...]
    guardrails: tuple[Metric, ...]

    @property
    def control(self) -> Arm:
        return self.arms[0]

    @property
    def treated(self) -> tuple[Arm, ...]:
        return self.arms[1:]

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(arm.share for arm in self.arms)


def experiment_of(
    name: str,
    start: datetime,
    end: datetime | None,
    arms: Iterable[DeclaredArm],
    metric_names: Iterable[str],
    guardrail_names: Iterable[str],
) -> Experiment:
    """An experiment to analyse. Raises DefinitionError for metrics that are unknown, or if no arm is shown."""
    made = [Arm(arm.name, arm.share, arm.model_version, arm.wish_template) for arm in arms]
    shown = sorted((arm for arm in made if arm.share > 0), key=lambda arm: arm.name != CONTROL)
    if not shown:
        raise DefinitionError(f"experiment {name!r} shows none of its arms; give at least one a share above 0")
    total = sum(arm.share for arm in shown)
    try:
        judged, guards = metrics(metric_names), metrics(guardrail_names)
    except DefinitionError as error:
        raise DefinitionError(f"experiment {name!r}: {error}") from None
    return Experiment(
        name,
        start,
        end,
        tuple(Arm(arm.name, arm.share / total, arm.model_version, arm.wish_template) for arm in shown),
        tuple(arm for arm in made if arm.share == 0),
        judged,
        guards,
    )


def read_declared(place: str) -> dict[str, Experiment | DefinitionError]:
    """Every experiment declared at `place`, a path or an `s3://bucket/key`, by its name, as whoever assigns people reads it; or
    what is wrong with its metrics: a fault there must not leave the others unwatched.

    Empty if nothing is there. Raises DefinitionError if the declarations cannot be read at all.
    """
    text = read(place)
    found: dict[str, Experiment | DefinitionError] = {}
    for one in () if text is None else read_experiments(text, place):
        try:
            found[one.name] = experiment_of(
                one.name,
                one.start.astimezone(UTC),
                one.end.astimezone(UTC) if one.end else None,
                one.arms,
                one.metrics,
                one.guardrails,
            )
        except DefinitionError as error:
            found[one.name] = error
    return found
