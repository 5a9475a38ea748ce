"""A day of requests: people ask the product's own application, and do with its lists what the truth says."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import numpy as np

from inference.recommend import Recommender
from inference.runtime import LarderApplication
from inference.settings import Settings
from orchestration.month.place import Place
from orchestration.month.plan import K, Plan, Trial
from orchestration.month.source import Organic
from orchestration.month.story import Arm, Day, Story, Visit
from orchestration.month.truth import DayTruth, clicks, hides
from orchestration.sources.simulator import Simulator, user_id
from orchestration.sources.simulator_world import DAY, PEOPLE_BLOCK, people_block
from schemas.serving import RecommendationRequest

AWAKE_HOURS = (6.0, 23.5)
_FLUSH_EVERY = 32
"""Requests between two waits for the log: its queue holds 256 reads, and here nobody pauses between two requests."""
_PATIENCE_MS = 60_000
VISITS_STREAM, CLICKS_STREAM = 101, 102
"""First element of the random streams' keys; the world's own are below."""


@dataclass(slots=True)
class Clock:
    """What the application takes for now."""

    at: datetime

    def __call__(self) -> datetime:
        return self.at


@contextmanager
def application(place: Place, plan: Plan, clock: Clock) -> Iterator[LarderApplication]:
    """The application that every door serves, on the month's deployment, by the month's clock; its vectors all logged."""
    app = LarderApplication.from_settings(
        Settings(
            place.url,
            place.artifacts_url,
            timeout_ms=_PATIENCE_MS,  # a busy machine is not what the month is about
            concurrency=1,
            audit_per_mille=1_000,
            request_log="off",
            experiments=str(place.experiments),
            exploration=plan.exploration,
        )
    )
    app.recommender = replace(app.recommender, now=clock)
    try:
        app.warm()
        yield app
    finally:
        app.close()


@dataclass(slots=True)
class Street:
    """Everybody who may come by, and what each of them has had."""

    plan: Plan
    organic: Organic
    simulator: Simulator
    had: dict[str, set[str]] = field(default_factory=dict)

    def present(self, day: int) -> list[str]:
        """Who has come before that day and not left for good."""
        begin = self.plan.midnight(day)
        second = int((begin - self.plan.world.started_at).total_seconds())
        numbers = sorted(int(who.removeprefix("user-")) for who, at in self.organic.first_event.items() if at < begin)
        blocks = {number // PEOPLE_BLOCK for number in numbers}
        leaves = {block: people_block(self.plan.world, block).leaves for block in blocks}
        return [user_id(n) for n in numbers if leaves[n // PEOPLE_BLOCK][n % PEOPLE_BLOCK] > second + DAY]

    def visitors(self, day: int) -> list[tuple[datetime, str]]:
        """Who asks on that day and when, in order."""
        rng = self.plan.world.generator(VISITS_STREAM, day)
        present = self.present(day)
        who = rng.choice(len(present), min(self.plan.visits, len(present)), replace=False)
        hours = np.sort(rng.uniform(*AWAKE_HOURS, len(who)))
        return [
            (self.plan.midnight(day) + timedelta(hours=float(h)), present[n]) for h, n in zip(hours, who, strict=True)
        ]

    def remember(self, pairs: Iterator[tuple[str, str]]) -> None:
        """Add what people took, as (person, item)."""
        for who, item in pairs:
            self.had.setdefault(who, set()).add(item)


def serve_day(app: LarderApplication, clock: Clock, street: Street, place: Place, story: Story, number: int) -> Day:
    """Answer everybody who asks on day `number`, and post what they do; it is added to the story."""
    plan = street.plan
    day = Day(number, plan.date(number))
    visitors = street.visitors(number)
    # Each looks at what there is when the day begins: what arrives on it is in no truth, and shown from tomorrow on.
    items = street.organic.available(plan.midnight(number))
    truth = DayTruth.of(street.simulator, [who for _, who in visitors], items, plan.noon(number))
    with place.connect() as connection:
        trending = [
            item
            for (item,) in connection.execute("SELECT item_id FROM popular_items WHERE list = 'trending' ORDER BY rank")
        ]
    rng = plan.world.generator(CLICKS_STREAM, number)
    trial = next((one for one in plan.trials if one.first <= number <= one.last), None)
    # Declarations are looked at again each second; a day here may take less.
    app.trials.arms.check()
    took: list[float] = []
    for turn, (clock.at, who) in enumerate(visitors):
        request_id = f"month-{number}-{turn}"
        request = RecommendationRequest(user_id=who, k=K, request_id=request_id)
        begin = time.perf_counter()
        answer = app.recommend(request)
        took.append((time.perf_counter() - begin) * 1_000)
        shown = [item.item_id for item in answer.items]
        relevance = truth.of_list(who, shown)
        arm = answer.experiment.arm if answer.experiment else None
        if trial is not None and answer.experiment is not None and answer.experiment.name == trial.name:
            for name in ("control", trial.arm):
                kept = day.arms.setdefault(trial.name, {}).setdefault(name, Arm())
                worth = relevance if name == arm else truth.of_list(who, _as_if(app.recommender, request, trial, name))
                kept.asked += 1
                kept.shown += len(worth)
                kept.clicks += float(clicks(worth).sum())
                kept.hides += float(hides(worth).sum())
        chance, hiding = clicks(relevance), hides(relevance)
        drawn = rng.random(len(shown))
        clicked, hidden = drawn < chance, drawn > 1 - hiding
        _post(app, clock.at, who, request_id, shown, clicked, hidden)
        _count(day, story, answer.model_version or "none", who, relevance, chance, clicked, hidden)
        day.degraded += bool(answer.degraded)
        if trial is not None and arm is not None:
            mine = day.arms[trial.name][arm]
            mine.lists += 1
            mine.clicked += int(clicked.sum())
            mine.hidden += int(hidden.sum())
        had = street.had.get(who, set())
        _compare(day, truth, who, had, trending)
        street.remember((who, item) for item, yes in zip(shown, clicked | hidden, strict=True) if yes)
        if turn % _FLUSH_EVERY == 0:
            app.flush(_PATIENCE_MS)
    app.flush(_PATIENCE_MS)
    visits = max(day.visits, 1)
    for name in ("relevance", "popular", "best"):
        setattr(day, name, getattr(day, name) / visits)
    day.p50_ms, day.p99_ms = (float(value) for value in np.percentile(took or [0.0], (50, 99)))
    story.days.append(day)
    return day


def _as_if(recommender: Recommender, request: RecommendationRequest, trial: Trial, arm: str) -> Sequence[str]:
    """The list that this very request would get in that arm: nothing of it is shown, logged or drawn at random."""
    new = arm == trial.arm
    beside = replace(
        recommender,
        served=None,
        trials=None,
        candidates=(trial.candidates if new else None) or recommender.candidates,
    )
    asked = request.model_copy(update={"diversity": trial.diversity if new else None})
    return [item.item_id for item in beside.recommend(asked).items]


def _post(
    app: LarderApplication,
    at: datetime,
    who: str,
    request_id: str,
    shown: Sequence[str],
    clicked: np.ndarray,
    hidden: np.ndarray,
) -> None:
    """What POST /events does with what a person did, but for its look at the clock on the wall."""
    rows: list[dict[str, object]] = [
        {
            "event_id": f"{request_id}-{place}",
            "user_id": who,
            "item_id": item,
            "kind": "click" if took else "hide",
            "value": None,
            "occurred_at": (at + timedelta(seconds=10 + 5 * place)).isoformat(),
            "request_id": request_id,
            "unless_said": True,
        }
        for place, (item, took, hid) in enumerate(zip(shown, clicked.tolist(), hidden.tolist(), strict=True))
        if took or hid
    ]
    if rows:
        app.writer.accept_events(rows, _PATIENCE_MS)


def _count(
    day: Day,
    story: Story,
    model: str,
    who: str,
    relevance: np.ndarray,
    chance: np.ndarray,
    clicked: np.ndarray,
    hidden: np.ndarray,
) -> None:
    day.visits += 1
    day.shown += len(relevance)
    day.clicked += int(clicked.sum())
    day.hidden += int(hidden.sum())
    day.clicks += float(chance.sum())
    day.relevance += float(relevance.mean()) if len(relevance) else 0.0
    day.models[model] = day.models.get(model, 0) + 1
    story.visits.append(Visit(day.number, who, float(1 - np.prod(1 - chance)), bool(clicked.any())))


def _compare(day: Day, truth: DayTruth, who: str, had: set[str], trending: Sequence[str]) -> None:
    """Add what the list of what is trending, and the best list, would be worth to this person."""
    popular = truth.of_list(who, [item for item in trending if item not in had and item in truth.items][:K])
    best = truth.best(who, had)
    day.popular += float(popular.mean()) if len(popular) else 0.0
    day.best += float(best.mean()) if len(best) else 0.0
    day.popular_clicks += float(clicks(popular).sum())
    day.best_clicks += float(clicks(best).sum())
