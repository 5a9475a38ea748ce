"""A day of requests: people ask the product's own application, and do with its lists what the truth says."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import numpy as np

from inference.recommend import Recommender
from inference.runtime import LarderApplication
from inference.settings import Settings
from orchestration.month.place import Place
from orchestration.month.plan import AS_IF_EVERY, K, Plan, Trial
from orchestration.month.source import Organic
from orchestration.month.story import Arm, Day, Story, Visit
from orchestration.month.truth import DayTruth, clicks, hides
from orchestration.sources.simulator import Simulator
from schemas.serving import RecommendationRequest

BETWEEN = timedelta(minutes=2)
"""From a list to the next one of the same visit."""
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
    taken: Counter[str] = field(default_factory=Counter)
    """How much each took from today's lists: what a list gives a person, they do not look for elsewhere."""

    def visitors(self, day: int) -> list[tuple[datetime, str]]:
        """Who asks on that day and when, in order: who has come by before, at the beginning of each of their visits and
        `lists_per_visit` times in all. Of more than `most_lists` some visits, drawn at random, ask for none."""
        last = self.plan.midnight(day + 1) - self.plan.lists_per_visit * BETWEEN  # all of it on one day
        visits = [(at, who) for at, who in self.organic.sessions(self.plan.date(day)) if at < last]
        most = self.plan.most_lists // self.plan.lists_per_visit
        if len(visits) > most:
            rng = self.plan.world.generator(VISITS_STREAM, day)
            visits = [visits[n] for n in np.sort(rng.choice(len(visits), most, replace=False))]
        return sorted((at + n * BETWEEN, who) for at, who in visits for n in range(self.plan.lists_per_visit))

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
    truth = DayTruth.of(street.simulator, sorted({who for _, who in visitors}), items, plan.noon(number))
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
        inside = trial is not None and answer.experiment is not None and answer.experiment.name == trial.name
        if trial is not None and inside and turn % AS_IF_EVERY == 0:
            for name in ("control", trial.arm):
                kept = day.arms.setdefault(trial.name, {}).setdefault(name, Arm())
                worth = relevance if name == arm else truth.of_list(who, as_if(app.recommender, request, trial, name))
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
        street.taken[who] += int(clicked.sum())
        if trial is not None and inside and arm is not None:
            mine = day.arms.setdefault(trial.name, {}).setdefault(arm, Arm())
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


def as_if(recommender: Recommender, request: RecommendationRequest, trial: Trial, arm: str) -> Sequence[str]:
    """The list that this very request would get in that arm: nothing of it is shown, logged or drawn at random."""
    new = arm == trial.arm
    pool = (trial.candidates if new else None) or recommender.candidates
    beside = replace(recommender, served=None, trials=None, candidates=pool)
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
