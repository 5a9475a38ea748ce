"""A served log for tests: rows of experiments with known effects."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import psycopg


@dataclass(frozen=True)
class Answer:
    """One row of the log; what a test does not say is of no account."""

    request_id: str
    user_id: str
    served_at: datetime
    item_ids: Sequence[str]
    arm: str | None = None
    arm_share: float | None = None
    experiment: str | None = "trial"
    propensities: Sequence[float] | None = None
    candidate_ids: Sequence[str] | None = None
    candidate_scores: Sequence[float] | None = None
    degraded: Sequence[str] = ()


@dataclass(frozen=True)
class Outcome:
    """What a person did with an item of an answer."""

    event_id: str
    user_id: str
    item_id: str
    kind: str
    occurred_at: datetime
    request_id: str | None
    value: float | None = None


def log(connection: psycopg.Connection, answers: Iterable[Answer], outcomes: Iterable[Outcome] = ()) -> None:
    """Write both."""
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO served_requests (request_id, user_id, served_at, experiment, arm, arm_share, model_version, item_ids, scores, "
            "propensities, candidate_ids, candidate_scores, candidates, sources, degraded) "
            "VALUES (%s, %s, %s, %s, %s, %s, 'm1', %s, %s, %s, %s, %s, 100, %s, %s)",
            [
                (
                    one.request_id, one.user_id, one.served_at, one.experiment, one.arm, one.arm_share, list(one.item_ids),
                    [0.0] * len(one.item_ids), one.propensities, one.candidate_ids, one.candidate_scores, json.dumps({}),
                    list(one.degraded),
                )
                for one in answers
            ],
        )  # fmt: skip
        cursor.executemany(
            "INSERT INTO recent_events (event_id, occurred_at, user_id, item_id, kind, value, request_id) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s)",
            [
                (one.event_id, one.occurred_at, one.user_id, one.item_id, one.kind, one.value, one.request_id)
                for one in outcomes
            ],
        )
    connection.commit()


@dataclass(frozen=True)
class Trial:
    """A simulated experiment in the log: rates of each arm, as (clicks, hides) per shown item."""

    start: datetime
    days: int = 6
    people: int = 900
    items: int = 5
    share: float = 0.5
    control: tuple[float, float] = (0.3, 0.1)
    treated: tuple[float, float] = (0.3, 0.1)
    arms: tuple[str, str] = ("control", "new")
    lost: float = 0.0
    """Share of the treated whose answers the log dropped."""
    seed: int = 5

    def write(self, connection: psycopg.Connection) -> None:
        rng = np.random.default_rng(self.seed)
        answers, outcomes = [], []
        for person in range(self.people):
            treated = bool(rng.random() < self.share)
            if treated and rng.random() < self.lost:
                continue
            clicks, hides = self.treated if treated else self.control
            for request in range(3):
                at = self.start + timedelta(days=float(rng.random() * (self.days - 0.05)))
                name = f"r{person}-{request}"
                shown = [f"i{place}" for place in range(self.items)]
                share = self.share if treated else 1 - self.share
                answers.append(Answer(name, f"u{person}", at, shown, self.arms[treated], share))
                for kind, rate in (("click", clicks), ("hide", hides)):
                    for place in np.flatnonzero(rng.random(self.items) < rate).tolist():
                        soon = at + timedelta(minutes=1 + place)
                        outcomes.append(Outcome(f"{name}-{place}-{kind}", f"u{person}", shown[place], kind, soon, name))
        log(connection, answers, outcomes)
