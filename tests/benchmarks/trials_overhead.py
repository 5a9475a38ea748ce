"""What experiments and the served log add to an answer: `python -m tests.benchmarks.trials_overhead`. Microseconds, medians.

Everything here is on the answer's path; no database is asked, so the log's thread only fills its queue.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from inference.arms import Arms, Plan
from inference.candidates import Candidates
from inference.explore import draw, explores
from inference.live import Columns
from inference.ranker import Ranker
from inference.served import ServedLog
from inference.served_request import ServedRequest, Slate, slate_of
from inference.shadows import Shadows
from inference.store import Store
from inference.trials import Trials
from inference.versions import Versions
from schemas.serving import RecommendationRequest, RecommendationResponse, RecommendedItem

ROUNDS = 20_000
NOBODY_LISTENS = "postgresql://127.0.0.1:1/none"
DECLARED = """
[experiments.first]
start = 2026-01-01T00:00:00Z
traffic = 0.3
[experiments.first.arms.control]
share = 0.5
[experiments.first.arms.treatment]
share = 0.5
diversity = 0.3
[experiments.second]
start = 2026-01-01T00:00:00Z
[experiments.second.arms.control]
share = 0.9
[experiments.second.arms.treatment]
share = 0.1
exploration = 0.02
"""


def median_us(work: Callable[[int], object], rounds: int = ROUNDS) -> float:
    """The median of `rounds` calls."""
    took = []
    for number in range(rounds):
        start = time.perf_counter_ns()
        work(number)
        took.append(time.perf_counter_ns() - start)
    return round(statistics.median(took) / 1_000, 2)


def trials(file: Path, declared: str) -> Trials:
    """Experiments as `declared`, in `file`, and a log that writes nowhere."""
    file.write_text(declared)
    store = Store(NOBODY_LISTENS, 1)
    arms = Arms(str(file), Versions(_no_ranker), lambda version: "", lambda: None)
    return Trials(arms, ServedLog(store, 0, requests=ROUNDS * 2), Shadows(), store)


def _no_ranker(version: str, path: str) -> Ranker:
    raise NotImplementedError("no version is named")


def measure(folder: Path) -> dict[str, float]:
    """Each part in microseconds."""
    n, at = 500, datetime.now(UTC)
    scores = np.random.default_rng(0).normal(size=n).astype(np.float32)
    none = np.zeros(n)
    candidates = Candidates(
        [f"item-{k:05}" for k in range(n)], [""] * n, [[]] * n, np.ones(n, np.int64), none, np.zeros((n, 64), np.float32),
        np.ones(n, bool), none.astype(np.float32), Columns([], {}, none, False),
    )  # fmt: skip
    items = tuple(RecommendedItem(item_id=f"i{k}", score=0.5, title="") for k in range(10))
    answer = RecommendationResponse(request_id="r", items=items, model_version="m")
    requests = [RecommendationRequest(user_id=f"user-{k}") for k in range(1_000)]
    slate = Slate(candidates.sources, n)
    none_declared, two = trials(folder / "none.toml", ""), trials(folder / "two.toml", DECLARED)
    plans = [two.plan(request, at) for request in requests]

    def after(number: int) -> None:
        two.after(requests[number % 1_000], at, plans[number % 1_000], (answer, slate), _never)

    figures = {
        "plan_without_experiments_us": median_us(lambda k: none_declared.plan(requests[k % 1_000], at)),
        "plan_two_experiments_us": median_us(lambda k: two.plan(requests[k % 1_000], at)),
        "slate_us": median_us(lambda k: slate_of(candidates, scores, None, False)),
        "hand_over_us": median_us(after),
        "is_explored_us": median_us(lambda k: explores(f"request-{k}", 0.02)),
        "pool_of_a_sampled_request_us": median_us(lambda k: slate_of(candidates, scores, None, True), 2_000),
        "explored_slate_us": median_us(lambda k: draw(f"request-{k}", scores, 10), 1_000),
    }
    figures["every_answer_us"] = round(
        sum(figures[name] for name in ("plan_two_experiments_us", "slate_us", "hand_over_us", "is_explored_us")), 2
    )
    two.served.requests.queued.clear()
    shown = ServedRequest("u", at, "a wish", answer, slate, plans[0].assignment)
    figures["row_after_the_answer_us"] = median_us(lambda _: json.dumps(shown.row()), 2_000)
    return figures


def _never(request: RecommendationRequest, plan: Plan) -> tuple[RecommendationResponse, Slate]:
    raise NotImplementedError("no shadow is declared")


if __name__ == "__main__":
    logging.disable()  # the log's thread finds no database
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(measure(Path(place))))
