"""What people did with what they were shown: where in the list they picked, how often, and whether scores foresaw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from orchestration.compute.beyond_accuracy import Reliability, reliability
from orchestration.compute.drift.served import Request, Window
from orchestration.compute.drift.sketches import CALIBRATION, LABELS, Kept, Mean, Name, mean_of
from orchestration.compute.duck import duck
from orchestration.compute.lake import Lake
from orchestration.compute.outcomes import load_outcomes, outcomes_kept
from schemas.events import NEGATIVE_KINDS

LEAST_PICKED = 50
"""Requests with a pick below which a reliability curve is only noise."""

Outcomes = dict[str, set[str]]
"""The items that a request led to, by request id."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """How well the champion's probability says what is picked: picks over expected picks, and the curve."""

    picked: int
    ratio: float
    curve: Reliability


def read_outcomes(connection: psycopg.Connection[Any], lake: Lake, window: Window) -> Outcomes:
    """What requests of the window led to: events that carry their id, hides left out."""
    found: Outcomes = {}
    with duck() as db:
        # A list that was shown late in the evening is picked from after midnight.
        load_outcomes(db, connection, lake, window.since, window.until + timedelta(days=1))
        rows = db.execute(
            "SELECT DISTINCT request_id, item_id FROM outcomes WHERE NOT kind = ANY(?)", [sorted(NEGATIVE_KINDS)]
        ).fetchall()
    for request_id, item_id in rows:
        found.setdefault(request_id, set()).add(item_id)
    return found


def outcomes_known(connection: psycopg.Connection[Any], lake: Lake, window: Window) -> bool:
    """False where events of the window's first day are gone: whatever was picked then would seem not to have been."""
    return outcomes_kept(connection, lake, window.first)


def picked(request: Request, outcomes: Outcomes) -> NDArray[np.bool_]:
    """`(k,)`: which of the shown items the request led to."""
    items = outcomes.get(request.request_id, set())
    return np.array([item in items for item in request.item_ids], bool)


def label_means(requests: Sequence[Request], outcomes: Outcomes, champion: str | None) -> dict[Name, Kept]:
    """How good the order was for what people picked: mean reciprocal rank of the first pick, and how often there was one.

    Under the champion alone: another model's order is another measure. A person is one observation.
    """
    mine = [one for one in requests if one.model_version == champion and one.item_ids]
    if not mine or champion is None:
        return {}
    hits = [picked(one, outcomes) for one in mine]
    people = [one.user_id for one in mine]
    some = [place for place, hit in enumerate(hits) if hit.any()]
    found: dict[Name, Kept] = {
        Name(LABELS, "pick_rate", champion): mean_of(np.array([float(hit.any()) for hit in hits]), people)
    }
    if some:
        ranks = np.array([1.0 / (1 + int(hits[place].argmax())) for place in some])
        found[Name(LABELS, "reciprocal_rank", champion)] = mean_of(ranks, [people[place] for place in some])
    return found


def probabilities(request: Request, calibration: tuple[float, float]) -> NDArray[np.float64]:
    """`(k,)`: what the champion says of each shown item: sigmoid(scale · score + offset)."""
    scale, offset = calibration
    logits = np.clip(scale * np.array(request.scores, np.float64) + offset, -50, 50)
    return np.asarray(1 / (1 + np.exp(-logits)))


def calibrated(
    requests: Sequence[Request], outcomes: Outcomes, champion: str | None, calibration: tuple[float, float] | None
) -> tuple[dict[Name, Kept], Calibrated | None]:
    """Picks over expected picks as a mean with its error, and the curve; nothing where there is no calibrated probability.

    What is compared is the ratio with that of weeks before. Its level is not 1 by right: the ranker learned what a person
    goes on to among all the items, and an answer shows only its best.
    """
    mine = [one for one in requests if one.model_version == champion and one.plain and one.item_ids]
    if not mine or champion is None or calibration is None:
        return {}, None
    said = [probabilities(one, calibration) for one in mine]
    hits = [picked(one, outcomes) for one in mine]
    by_person: dict[str, list[float]] = {}
    for one, probability, hit in zip(mine, said, hits, strict=True):
        entry = by_person.setdefault(one.user_id, [0.0, 0.0])
        entry[0] += float(hit.sum())
        entry[1] += float(probability.sum())
    seen, expected = np.array(list(by_person.values())).T
    ratio = float(seen.sum() / max(expected.sum(), 1e-12))
    # The delta method's error of a ratio of sums over people.
    spread = float((seen - ratio * expected).std(ddof=1)) if len(seen) > 1 else float("inf")
    error = spread * np.sqrt(len(seen)) / max(float(expected.sum()), 1e-12)
    kept: dict[Name, Kept] = {Name(CALIBRATION, "picks_over_expected", champion): Mean(len(seen), ratio, error)}
    total = int(seen.sum())
    if total < LEAST_PICKED:
        return kept, None
    return kept, Calibrated(total, ratio, reliability(np.concatenate(said), np.concatenate(hits)))
