"""The month's calendar, sizes and constants of behaviour. All were fixed before the first result was looked at."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta

from orchestration.sources.simulator_world import World
from schemas.errors import SettingsError

HISTORY_DAYS = 90
"""What is known before the first day."""
CALENDAR_DAYS = 30
"""The days that the calendar below is written for; another length stretches it."""
LEAST_DAYS, MOST_DAYS = 6, 60

CLICK_AT, CLICK_SCALE = 3.0, 1.0
"""Somebody who looks at an item takes it with probability sigmoid((relevance - CLICK_AT) / CLICK_SCALE): halfway between the
relevance from which the world's people rate 4 and that from which they rate 5. The scale is that of their own choices."""
HIDE_AT, HIDE_MOST = -0.2, 0.2
"""Who looks and does not take hides with HIDE_MOST * sigmoid((HIDE_AT - relevance) / CLICK_SCALE): about what would be rated 1."""
K = 10
"""Items of a list. The item at place r, from 1, is looked at with probability 1 / log2(1 + r), as NDCG discounts."""
REST_DAYS = 7
"""After a training no other is begun for so long, whatever drifts: what is new has to be seen first."""
LEFT_DAYS = 3
"""Nor in the month's last days: nothing of what it brings would be seen."""
AS_IF_EVERY = 3
"""Of an experiment's requests each so manieth is answered again as the other arm would have, for the truth."""


GUARDRAILS = ("hide_rate", "click_rate")
"""Of both experiments."""


@dataclass(frozen=True, slots=True)
class Trial:
    """An experiment of the month: days `first` to `last`, and what its new arm does in place of what everybody gets."""

    name: str
    arm: str
    first: int
    last: int
    share: float
    diversity: float
    candidates: int | None
    words: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A month that begins on `first`; days are numbered from 1."""

    first: date
    days: int = CALENDAR_DAYS
    seed: int = 7
    people: int = 1_400
    items: int = 900
    events_per_person: float = 68.0
    drift_strength: float = 1.0
    lists_per_visit: int = 2
    most_lists: int = 400
    """In a day."""
    size: str = "small"
    epochs: int = 10
    slate_rows: int = 3_000
    validation_labels: int = 150
    judged: int = 500
    """Labels of each split that the gate judges by."""
    exploration: float = 0.1
    """Of the lists after the experiments; what is told of their worth by off-policy estimates is held against the truth."""
    history_days: int = HISTORY_DAYS
    trials: tuple[Trial, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not LEAST_DAYS <= self.days <= MOST_DAYS:
            raise SettingsError(
                f"a month of {self.days} days cannot be told; give DAYS from {LEAST_DAYS} to {MOST_DAYS}"
            )
        parted = self._at(5)
        trials = (
            Trial("variety", "mixed", self._at(2), parted, 0.5, 0.3, None, "lists are made a little more varied (diversity 0.3)"),
            Trial(
                "careless", "hasty", parted + 1, max(parted + 1, self._at(18)), 0.5, 1.0, 1_000,
                "a careless change: lists are made for variety alone, of everything there is (diversity 1, candidates 1000)",
            ),
        )  # fmt: skip
        object.__setattr__(self, "trials", trials)

    def _at(self, day: int) -> int:
        return max(1, round(day * self.days / CALENDAR_DAYS))

    @property
    def drift_day(self) -> int:
        """The first day on which everybody wants something else than the day before."""
        return self._at(22)

    @property
    def training_day(self) -> int:
        """At its end a new model is trained whatever drifted, unless one was lately."""
        return self._at(25)

    @property
    def rollback_day(self) -> int:
        """The day that the model before serves again; the newest returns on the next."""
        return self._at(27)

    @property
    def explores_from(self) -> int:
        return max(trial.last for trial in self.trials) + 1

    def date(self, day: int) -> date:
        return self.first + timedelta(days=day - 1)

    def midnight(self, day: int) -> datetime:
        """When day `day` begins."""
        return datetime.combine(self.date(day), time(), UTC)

    def noon(self, day: int) -> datetime:
        return self.midnight(day) + timedelta(hours=12)

    @property
    def world(self) -> World:
        return World(
            start=self.first - timedelta(days=self.history_days),
            seed=self.seed,
            people=self.people,
            items=self.items,
            days=self.history_days + CALENDAR_DAYS,
            events_per_person=self.events_per_person,
            drift_at=self.history_days + self.drift_day - 1,
            drift_strength=self.drift_strength,
        )

    def experiments(self) -> str:
        """What is declared in experiments.toml."""
        tables = []
        for trial in self.trials:
            pool = f"candidates = {trial.candidates}\n" if trial.candidates else ""
            tables.append(
                f"[experiments.{trial.name}]\n"
                f"start = {self.midnight(trial.first):%Y-%m-%dT%H:%M:%SZ}\nend = {self.midnight(trial.last + 1):%Y-%m-%dT%H:%M:%SZ}\n"
                f'metrics = ["click_rate"]\nguardrails = {json.dumps(GUARDRAILS)}\n'
                f"[experiments.{trial.name}.arms.control]\nshare = {1 - trial.share:g}\nexploration = 0\n"
                f"[experiments.{trial.name}.arms.{trial.arm}]\nshare = {trial.share:g}\nexploration = 0\ndiversity = {trial.diversity}\n{pool}"
            )
        return "\n".join(tables)
