"""Experiments: their declaration in one small file, and which arm a person is in. No state, no clock, no database.

    [experiments.<name>]              start, end, unit, salt, traffic, metrics, guardrails
    [experiments.<name>.arms.<arm>]   share, model_version, wish_template, diversity, candidates, exploration

An A/B test, a canary, a shadow (share 0) and a comparison of prompts are all this one thing. Experiments are tried in the
order of the file: the first that runs and whose `traffic` takes the person has them, and no other. Which arm that is
follows from a hash of the experiment and the person alone, so it is the same in every process and stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any

from schemas import prompts
from schemas.declarations import near
from schemas.errors import DefinitionError
from schemas.ranker import MAX_CANDIDATES

MAX_EXPERIMENTS = 32
MAX_ARMS = 16
MAX_VERSIONS = 4
"""So many model versions may all experiments together name: each is held in memory beside the champion."""
LEAST_CANDIDATES = 10
MAX_NAMES = 32
"""So many metrics, or guardrails, may one experiment name."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}", re.ASCII)
_VERSION = re.compile(r"[0-9a-f]{16}", re.ASCII)
_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to answer, and of how many people in the experiment (0: of none, a shadow). None: as without it."""

    name: str
    share: float
    model_version: str | None = None
    wish_template: str | None = None
    diversity: float | None = None
    """Holds for requests that say none themselves."""
    candidates: int | None = None
    exploration: float | None = None
    """Of how many of its requests the order is drawn at random, see inference/explore.py."""

    @property
    def shadow(self) -> bool:
        """Whether nobody is shown it."""
        return self.share == 0


SETTINGS = tuple(field.name for field in fields(Arm) if field.name not in ("name", "share"))
"""What an arm may differ in."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """A declared experiment; arms in the order of the file, shares above zero sum to 1."""

    name: str
    start: datetime
    arms: tuple[Arm, ...]
    end: datetime | None = None
    unit: str = "user"
    salt: str = ""
    """Another salt deals the same people out anew."""
    traffic: float = 1.0
    """Of how many people it takes."""
    metrics: tuple[str, ...] = ()
    guardrails: tuple[str, ...] = ()

    def runs(self, at: datetime) -> bool:
        """Whether it takes people at that instant."""
        return self.start <= at and (self.end is None or at < self.end)

    def varies(self, setting: str) -> bool:
        """Whether any of its arms says something of that one of SETTINGS."""
        return any(getattr(arm, setting) is not None for arm in self.arms)

    @property
    def shown(self) -> tuple[Arm, ...]:
        """The arms that people are in."""
        return tuple(arm for arm in self.arms if not arm.shadow)

    @property
    def shadows(self) -> tuple[Arm, ...]:
        """The arms that are computed beside the answer and shown to nobody."""
        return tuple(arm for arm in self.arms if arm.shadow)


@dataclass(frozen=True, slots=True)
class Assignment:
    """The experiment that has a person, and their arm; its probability for whoever is in the experiment is `arm.share`."""

    experiment: Experiment
    arm: Arm


def assign(experiments: Sequence[Experiment], user_id: str, at: datetime) -> Assignment | None:
    """The experiment and arm of a person at an instant, None where no experiment has them."""
    for experiment in experiments:
        if experiment.runs(at):
            taken, place = places(experiment, user_id)
            if taken < experiment.traffic:
                return Assignment(experiment, _arm_at(experiment.shown, place))
    return None


def places(experiment: Experiment, user_id: str) -> tuple[float, float]:
    """Two uniform numbers in [0, 1) of a person in an experiment: the one that `traffic` is compared with, the one that
    picks the arm. Any change of this deals everybody out anew."""
    # Names and salts hold no zero byte, ids neither, so that no two of these read the same.
    key = f"{experiment.salt}\0{experiment.name}\0{user_id}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(key, digest_size=16, person=b"larder-assign").digest()
    # 53 bits: what a float holds exactly, so that none is rounded up to 1.
    return (int.from_bytes(digest[:8]) >> 11) / 2**53, (int.from_bytes(digest[8:]) >> 11) / 2**53


def _arm_at(arms: Sequence[Arm], place: float) -> Arm:
    # By running sums: where a share grows at its neighbour's cost, nobody else changes arms.
    for arm in arms[:-1]:
        if place < arm.share:
            return arm
        place -= arm.share
    return arms[-1]


def versions(experiments: Sequence[Experiment], at: datetime) -> tuple[str, ...]:
    """The model versions that experiments name which have not ended by then."""
    named = [arm.model_version for each in experiments if each.end is None or at < each.end for arm in each.arms]
    return tuple(dict.fromkeys(version for version in named if version is not None))


# --- the file -----------------------------------------------------------------------------------------------------


def read_experiments(text: str, name: str = "experiments.toml") -> tuple[Experiment, ...]:
    """The experiments declared in `text`. Raises DefinitionError that lists every fault, each with the way out."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DefinitionError(f"{name} is no TOML ({error}); mend the file") from error
    faults: list[str] = []
    for key in raw:
        if key != "experiments":
            faults.append(f"{key!r} is unknown; the file has tables [experiments.<name>]: remove it")
    tables = raw.get("experiments", {})
    made: list[Experiment] = []
    if not isinstance(tables, dict):
        faults.append(f"experiments is {_cut(tables)}; write tables [experiments.<name>]")
    else:
        for each, table in tables.items():
            experiment = _experiment(each, table, faults)
            if experiment is not None:
                made.append(experiment)
        if len(tables) > MAX_EXPERIMENTS:
            faults.append(f"there are {len(tables)} experiments; at most {MAX_EXPERIMENTS}: remove those that ended")
    _check_together(made, faults)
    if faults:
        raise DefinitionError(f"{name} cannot be used: " + "; ".join(faults))
    return tuple(made)


def stopped(experiments: Sequence[Experiment], text: str, name: str) -> tuple[Experiment, ...]:
    """The experiments without those that `text` says are over: `{"<experiment>": {"stopped_at": "<instant>", …}}`.

    A guardrail that was broken stops an experiment by such a record beside its declaration; its entry taken out starts it
    again. Raises DefinitionError if it is no such record.
    """
    try:
        at = {each: datetime.fromisoformat(entry["stopped_at"]) for each, entry in json.loads(text).items()}
        if any(instant.tzinfo is None for instant in at.values()):
            raise ValueError("an instant without a zone")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DefinitionError(
            f'{name} cannot be used ({type(error).__name__}); it holds {{"<experiment>": {{"stopped_at": "<instant>"}}}}: mend '
            "it, or remove it to start every experiment again"
        ) from error
    return tuple(
        replace(each, end=min(at[each.name], each.end or at[each.name])) if each.name in at else each
        for each in experiments
    )


def _experiment(name: str, table: object, faults: list[str]) -> Experiment | None:
    place = f"experiments.{name}"
    before = len(faults)
    if not _NAME.fullmatch(name):
        faults.append(f"experiment {_cut(name)}: {_NAME_RULE}")
    if not isinstance(table, dict):
        faults.append(f"{place} is {_cut(table)}; write a table [{place}]")
        return None
    values = _checked(place, {key: value for key, value in table.items() if key != "arms"}, _EXPERIMENT_KEYS, faults)
    if "start" not in table:
        faults.append(f"{place}.start is missing; say when it begins, as in start = 2030-01-31T12:00:00Z")
    elif "start" in values and "end" in values and values["end"] <= values["start"]:
        faults.append(f"{place}.end is {values['end']}, not after its start {values['start']}; give a later end")
    arms = _arms(place, table.get("arms"), faults)
    if len(faults) > before:
        return None
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Experiment(name=name, arms=arms, **values)


def _arms(place: str, tables: object, faults: list[str]) -> tuple[Arm, ...]:
    if not isinstance(tables, dict) or not tables:
        faults.append(f"{place} has no arms; write tables [{place}.arms.<arm>] with a share each")
        return ()
    if len(tables) > MAX_ARMS:
        faults.append(f"{place} has {len(tables)} arms; at most {MAX_ARMS}: remove some")
    made: list[Arm] = []
    before = len(faults)
    for name, table in tables.items():
        where = f"{place}.arms.{name}"
        if not _NAME.fullmatch(name):
            faults.append(f"arm {_cut(name)} of {place}: {_NAME_RULE}")
        if not isinstance(table, dict):
            faults.append(f"{where} is {_cut(table)}; write a table [{where}]")
            continue
        values = _checked(where, table, _ARM_KEYS, faults)
        if "share" not in table:
            faults.append(f"{where}.share is missing; give a number from 0 (a shadow) to 1")
        elif "share" in values:
            made.append(Arm(name, **values))
    if len(faults) == before:
        total = sum(arm.share for arm in made)
        if abs(total - 1) > 1e-6:
            faults.append(
                f"the shares of {place} sum to {total:g}; they must sum to 1, a shadow (share 0) not counted: mend them"
            )
        for arm in made:
            if arm.shadow and arm.exploration:
                faults.append(
                    f"{place}.arms.{arm.name}.exploration is {arm.exploration:g} for a shadow, which nobody is shown; "
                    "remove it"
                )
    return tuple(made)


def _check_together(made: Sequence[Experiment], faults: list[str]) -> None:
    named = {arm.model_version for each in made for arm in each.arms if arm.model_version is not None}
    if len(named) > MAX_VERSIONS:
        faults.append(
            f"the arms name {len(named)} model versions; at most {MAX_VERSIONS} are held in memory: remove some"
        )
    for place, later in enumerate(made):
        for earlier in made[:place]:
            if earlier.traffic == 1 and _overlap(earlier, later):
                faults.append(
                    f"experiments.{later.name} gets nobody while experiments.{earlier.name}, which stands before it, takes "
                    f"everybody; give {earlier.name} a traffic below 1, or let one end before the other starts"
                )


def _overlap(one: Experiment, other: Experiment) -> bool:
    return (one.end is None or other.start < one.end) and (other.end is None or one.start < other.end)


def _checked(
    place: str, table: Mapping[str, Any], checks: Mapping[str, Callable[[Any], str | None]], faults: list[str]
) -> dict[str, Any]:
    """The values of `table` that will do; what is wrong with the others goes to `faults`."""
    good: dict[str, Any] = {}
    for key, value in table.items():
        check = checks.get(key)
        if check is None:
            faults.append(f"{place}.{key} is unknown{near(key, checks)}: remove or rename it")
        elif (wanted := check(value)) is not None:
            faults.append(f"{place}.{key} is {_cut(value)}; {wanted}")
        else:
            good[key] = value
    return good


_NAME_RULE = "call it by small letters, digits, '_', '.' and '-', at most 64, the first a letter or a digit"


def _instant(value: Any) -> str | None:
    # tomllib gives a datetime without zone, a date and a time types that an offset makes out of none of them.
    if isinstance(value, datetime) and value.tzinfo is not None:
        return None
    return "give an instant with its zone and without quotes, as in 2030-01-31T12:00:00Z"


def _number(low: float, high: float) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            return None
        return f"give a number from {low:g} to {high:g}"

    return check


def _whole(low: int, high: int) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return None
        return f"give a whole number from {low} to {high}"

    return check


def _traffic(value: Any) -> str | None:
    if _number(0, 1)(value) is None and value > 0:
        return None
    return "give a number above 0, at most 1; an experiment that is over has an end"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and "\0" not in value and len(value) <= 200 else "give a text"


def _unit(value: Any) -> str | None:
    return None if value == "user" else 'give "user": people are what is dealt out'


def _names(value: Any) -> str | None:
    good = isinstance(value, list) and all(isinstance(each, str) and each.strip() for each in value)
    if good and len(set(value)) == len(value) <= MAX_NAMES:
        return None
    return f'give a list of at most {MAX_NAMES} names, each once, as in ["clicks"]'


def _version(value: Any) -> str | None:
    if isinstance(value, str) and _VERSION.fullmatch(value):
        return None
    return "give a released version, 16 hex digits; the table model_versions lists them"


def _template(value: Any) -> str | None:
    known = prompts.versions("wish")
    if isinstance(value, str) and value in known:
        return None
    return f"there is no such wish template{near(str(value), known)}; add it below schemas/prompt_templates, or name another"


_EXPERIMENT_KEYS: dict[str, Callable[[Any], str | None]] = {
    "start": _instant,
    "end": _instant,
    "unit": _unit,
    "salt": _text,
    "traffic": _traffic,
    "metrics": _names,
    "guardrails": _names,
}
_ARM_KEYS: dict[str, Callable[[Any], str | None]] = {
    "share": _number(0, 1),
    "model_version": _version,
    "wish_template": _template,
    "diversity": _number(0, 1),
    "candidates": _whole(LEAST_CANDIDATES, MAX_CANDIDATES),
    "exploration": _number(0, 1),
}


def _cut(value: object) -> str:
    shown = f"{value.isoformat()}" if hasattr(value, "isoformat") else repr(value)
    return shown if len(shown) <= _SHOWN_CHARS else shown[: _SHOWN_CHARS - 1] + "…"
