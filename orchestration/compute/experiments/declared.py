"""What experiments.toml declares, as far as the analysis needs it: who is compared with whom, by which metrics, since when.

How people are assigned is decided where requests are answered. What an arm changes is no concern of the analysis, but for
the model version and the wish template, which it names and can take back.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Protocol

from orchestration.compute.experiments.metrics import Metric, metrics
from schemas.errors import DefinitionError

FILE = "experiments.toml"
VARIABLE = "LARDER_EXPERIMENTS"
"""Names another file."""
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


def experiments_file(folder: Path) -> Path:
    """Where the declarations of the deployment in `folder` lie."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else folder / FILE


def read_experiments(file: Path) -> dict[str, Experiment | DefinitionError]:
    """Every experiment in `file` by its name, or what is wrong with it: a fault in one must not leave the others unwatched.

    None if the file does not exist. Raises DefinitionError if it cannot be read at all.
    """
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DefinitionError(f"{file} is no TOML ({error}); mend the file") from error
    declared = raw.get("experiments", {})
    if not isinstance(declared, dict):
        raise DefinitionError(f"{file}: experiments is no table; declare each as [experiments.<name>]")
    found: dict[str, Experiment | DefinitionError] = {}
    for name, entry in declared.items():
        try:
            found[name] = _experiment(name, entry)
        except DefinitionError as error:
            found[name] = error
    return found


def _experiment(name: str, entry: Any) -> Experiment:
    arms = entry.get("arms") if isinstance(entry, dict) else None
    if not isinstance(arms, dict):
        raise DefinitionError(f"experiment {name!r} has no arms; declare each as [experiments.{name}.arms.<arm>]")
    if "start" not in entry:
        raise DefinitionError(f"experiment {name!r} has no start; give a time such as 2030-01-31T12:00:00Z")
    named = {field: entry.get(field, []) for field in ("metrics", "guardrails")}
    for field, names in named.items():
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            raise DefinitionError(f"experiment {name!r}: {field} is {names!r}; give a list of metric names")
    return experiment_of(
        name,
        _instant(name, "start", entry["start"]),
        _instant(name, "end", entry["end"]) if "end" in entry else None,
        [_arm(name, arm, fields) for arm, fields in arms.items()],
        named["metrics"],
        named["guardrails"],
    )


def _arm(experiment: str, name: str, fields: Any) -> Arm:
    share = fields.get("share") if isinstance(fields, dict) else None
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise DefinitionError(f"experiment {experiment!r}, arm {name!r}: its share is {share!r}; give one of 0 to 1")
    return Arm(name, float(share), fields.get("model_version"), fields.get("wish_template"))


def _instant(name: str, field: str, value: object) -> datetime:
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        raise DefinitionError(
            f"experiment {name!r}: {field} is {value!r}, which is no time; write it without quotes, for example "
            "2030-01-31T12:00:00Z"
        )
    return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
