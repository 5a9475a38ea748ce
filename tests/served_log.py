"""Weeks of a served log in a test's database: requests, their features and picks, as a function would have written them."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, time, timedelta

import numpy as np
import psycopg
from conftest import TODAY

from infra import registry
from schemas.views import ITEM_ACTIVITY, USER_ACTIVITY, fingerprint

MODEL = "m1"
PEOPLE, ITEMS, SHOWN = 150, 120, 5
PER_DAY = 120
CATEGORIES = ("odd", "even")


def prepare(connection: psycopg.Connection, trained_until: datetime) -> None:
    """A catalogue without texts, and a champion that says how its scores are probabilities."""
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO items (item_id, title, categories, attributes) VALUES (%s, '', %s, %s)",
            [(item(n), [CATEGORIES[n % 2 == 0]], json.dumps({"provider": f"house {n % 3}"})) for n in range(ITEMS)],
        )
    manifest = {"trained_until": trained_until.isoformat(), "quality": {"calibration": {"scale": 1.0, "offset": -2.0}}}
    connection.execute(
        "INSERT INTO model_versions (version, name, path, manifest) VALUES (%s, 'ranker', 'models/m1', %s)",
        (MODEL, json.dumps(manifest)),
    )
    registry.record_gate(connection, MODEL, True, {"words": ["it may serve"]})
    registry.promote(connection, MODEL)


def item(number: int) -> str:
    return f"i{number:03}"


def person(number: int) -> str:
    return f"p{number:03}"


def serve_day(
    connection: psycopg.Connection,
    day: date,
    *,
    moved: float = 0.0,
    pick_rate: float = 0.5,
    popular: float = 1.0,
    seed: int = 0,
) -> None:
    """One request of each of `PER_DAY` people, picked from at `pick_rate` (place by place less).

    `moved` shifts the first feature of user_activity, in standard deviations; items are shown by a power `popular` of
    their number, so that 1 shows all alike. What a day holds hangs on how long ago it is: the same on whatever date it runs.
    """
    generator = np.random.default_rng([1 + seed, (TODAY.date() - day).days])
    weight = np.arange(1, ITEMS + 1) ** -(popular - 1.0)
    served, reads, events = [], [], []
    for number in generator.permutation(PEOPLE)[:PER_DAY].tolist():
        at = datetime.combine(day, time(), UTC) + timedelta(seconds=int(generator.integers(0, 80_000)))
        request_id = f"r-{day}-{number}-{seed}"
        shown = [item(n) for n in generator.choice(ITEMS, SHOWN, replace=False, p=weight / weight.sum()).tolist()]
        scores = np.sort(generator.normal(0, 1, SHOWN))[::-1].tolist()
        degraded = ["features"] if generator.random() < 0.05 else []
        sources = json.dumps({"vector": 200, "popular": int(generator.integers(50, 60))})
        served.append((request_id, person(number), at, MODEL, shown, scores, 250, sources, degraded))
        mine = generator.normal(0, 1, len(USER_ACTIVITY.features))
        mine[0] += moved
        theirs = generator.normal(0, 1, (SHOWN, len(ITEM_ACTIVITY.features)))
        for view, keys, values in ((USER_ACTIVITY, [person(number)], mine), (ITEM_ACTIVITY, shown, theirs)):
            names = [feature.name for feature in view.features]
            reads.append(
                (
                    f"read-{request_id}",
                    view.name,
                    request_id,
                    person(number),
                    at,
                    fingerprint((view,)),
                    names,
                    keys,
                    values.ravel().tolist(),
                )
            )
        if generator.random() < pick_rate:
            place = int(generator.choice(SHOWN, p=np.array([8, 4, 2, 1, 1]) / 16))
            events.append((f"e-{request_id}", at + timedelta(seconds=30), person(number), shown[place], request_id))
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO served_requests (request_id, user_id, served_at, model_version, item_ids, scores, candidates, "
            "sources, degraded) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
            served,
        )
        cursor.executemany(
            "INSERT INTO served_features (read_id, view, request_id, user_id, read_at, definition_hash, features, keys, "
            "numbers) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
            reads,
        )
        cursor.executemany(
            "INSERT INTO recent_events (event_id, occurred_at, user_id, item_id, kind, request_id) "
            "VALUES (%s, %s, %s, %s, 'click', %s)",
            events,
        )
