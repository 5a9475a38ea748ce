"""What explanations and rules are worth: faithful, quick, never broken, monotone. Run: `python -m tests.benchmarks.loop_explain`.

    explanation_fidelity   of cases in which an event is named: making the whole request again for a person who never had it
                           costs the item more places than for one who never had a random other one
    explain_added_p50_ms   what `explain` adds to a request for ten items: the same requests with and without, in turn
    rules_broken           hard rules broken by random requests under random rules
    diversity_monotone     whether mean intra-list diversity never falls from one diversity setting to the next

The ranker is real, trained on the simulator's world, `standard`, int8. Each counterfactual person is a person of their own,
whose events are ingested and whose features are built by the product's own road; nothing is patched.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

import orchestration  # first: it sets how OpenMP waits
from inference.recommend import Recommender
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from schemas.events import Event
from schemas.features import ITEM
from schemas.serving import Because, RecommendationRequest
from schemas.views import VIEWS
from tests.benchmarks.frame import note
from tests.benchmarks.loop_explain_world import QUICK, Size, Trained, trained
from tests.rule_cases import PROMPTS, Catalogue, serve_before, try_many
from tests.worlds import ListSource

assert orchestration is not None
SECTIONS = ("added", "diversity", "rules", "fidelity")
POOL = 500
PER_PERSON = 4
"""Cases of one person at most: items of one slate hang together."""
SETTINGS = tuple(round(0.1 * step, 1) for step in range(11))


@dataclass(frozen=True, slots=True)
class Case:
    """An item shown to a person, the event that its explanation names, and a random other event of theirs."""

    user_id: str
    item_id: str
    named: str
    other: str

    def twins(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """`(person, item they never had)` of the two who must be made."""
        return (self.user_id, self.named), (self.user_id, self.other)


def measure(quick: bool = False, folder: Path | None = None, only: Iterable[str] = SECTIONS) -> dict[str, Any]:
    """All figures, or those of the sections `only`; the trained world is kept in `folder`, by default built for this run."""
    size = QUICK if quick else Size()
    with tempfile.TemporaryDirectory(prefix="larder-loop-explain-") as scratch:
        world = trained(folder or Path(scratch), size)
        found: dict[str, Any] = {"explain_world": size.source, "explain_model": world.version}
        found["explain_validation_ndcg_at_10"] = round(world.validation_ndcg_at_10, 4)
        changed = {"rules", "fidelity"} & set(only)
        with copied(world) if changed else nullcontext(world) as copy:
            sections = {
                "added": lambda: added_ms(world, people=20 if quick else 200),
                "diversity": lambda: diversity(world, people=20 if quick else 300),
                "rules": lambda: rules(copy, requests=200 if quick else 10_000),
                "fidelity": lambda: fidelity(copy, cases=40 if quick else 1_000),
            }
            for name in SECTIONS:
                if name in only:
                    figures = sections[name]()
                    note(f"{name}: {json.dumps(figures)}")
                    found |= figures
    return found


def fidelity(world: Trained, cases: int) -> dict[str, Any]:
    """Whether what is named matters, on `cases` cases of as many people as that takes. Changes the database of `world`."""
    found, asked, named = _cases(world, cases)
    twins = sorted({twin for case in found for twin in case.twins()})
    note(f"{len(found)} cases of {len({case.user_id for case in found})} people; {len(twins)} people without an event")
    names = _make_twins(world, twins)
    application = world.application()
    try:
        places = {
            user: _places(application.recommender, user)
            for user in [*sorted({case.user_id for case in found}), *names.values()]
        }
    finally:
        application.close()
    won = []
    for case in found:
        before = places[case.user_id].get(case.item_id, POOL + 1)
        fell = [places[names[twin]].get(case.item_id, POOL + 1) - before for twin in case.twins()]
        won.append(fell[0] > fell[1])
    rate = float(np.mean(won)) if won else float("nan")
    half = 1.96 * float(np.sqrt(rate * (1 - rate) / max(len(won), 1)))
    return {
        "explanation_fidelity": round(rate, 4),
        "explanation_fidelity_ci": [round(rate - half, 4), round(rate + half, 4)],
        "explanation_cases": len(won),
        "explanation_named_rate": round(named / max(asked, 1), 4),
    }


def _cases(world: Trained, cases: int) -> tuple[list[Case], int, int]:
    """Cases, how many shown items were looked at, and of how many an event is named."""
    rng = np.random.default_rng(0)
    with psycopg.connect(world.url) as connection:
        had: dict[str, set[str]] = {}
        for user_id, item_id in connection.execute("SELECT user_id, item_id FROM user_history"):
            had.setdefault(user_id, set()).add(item_id)
    application = world.application()
    found: list[Case] = []
    asked = named = 0
    try:
        for user_id in rng.permutation(world.people).tolist():
            if len(found) >= cases:
                break
            answer = application.recommender.recommend(RecommendationRequest(user_id=user_id, explain=True))
            assert not answer.degraded, answer.degraded
            asked += len(answer.items)
            told = [(item.item_id, one) for item in answer.items if (one := _named(item.because or ())) is not None]
            named += len(told)
            for place in rng.permutation(len(told))[:PER_PERSON].tolist():
                item_id, one = told[place]
                others = sorted(had[user_id] - {one.item_id})
                if others and len(found) < cases:
                    found.append(Case(user_id, item_id, one.item_id or "", str(rng.choice(others))))
    finally:
        application.close()
    return found, asked, named


def _named(because: Iterable[Because]) -> Because | None:
    """The first event without which the item would stand lower: what the words name, see `inference.explain.tried`."""
    return next((one for one in because if one.kind == "event" and (one.places or 0) > 0), None)


def _make_twins(world: Trained, twins: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Ingest a person for each of `twins`, with all events but those with the item; their ids."""
    names = {twin: f"twin-{number:05}" for number, twin in enumerate(twins)}
    lake = Lake(world.lake_url)
    with psycopg.connect(world.url, options="-c TimeZone=UTC") as connection:
        table = lake.dataset(list(lake.paths(connection).values())).to_table(
            columns=["event_id", "user_id", "item_id", "kind", "value", "occurred_at"]
        )
        held: dict[str, list[dict[str, Any]]] = {}
        people = {user_id for user_id, _ in twins}
        for row in table.to_pylist():
            if row["user_id"] in people:
                held.setdefault(row["user_id"], []).append(row)
        events = [
            Event(
                f"{names[twin]}-{row['event_id']}", names[twin], row["item_id"], row["kind"], row["value"],
                row["occurred_at"].astimezone(UTC),
            )
            for twin in twins
            for row in held[twin[0]]
            if row["item_id"] != twin[1]
        ]  # fmt: skip
        ingest(ListSource(list(events), name="twins"), lake, connection)
        connection.commit()
    yesterday = (datetime.fromisoformat(world.until).replace(tzinfo=UTC) - timedelta(days=1)).date()
    for view in VIEWS:
        # Of the items, everybody's features stay those of the world that was explained.
        if view.entity != ITEM:
            materialise(view, yesterday, yesterday, url=world.url, lake=lake)
    return names


def _places(recommender: Recommender, user_id: str) -> dict[str, int]:
    answer = recommender.recommend(RecommendationRequest(user_id=user_id, k=POOL))
    assert not answer.degraded, answer.degraded
    return {item.item_id: place for place, item in enumerate(answer.items, start=1)}


def added_ms(world: Trained, people: int) -> dict[str, Any]:
    """Milliseconds that `explain` adds for ten items, with a wish and without; plain and explained requests in turn."""
    rng = np.random.default_rng(1)
    chosen = rng.permutation(world.people)[:people].tolist()
    application = world.application()
    found: dict[str, Any] = {}
    try:
        for name, prompt in (("", None), ("_wish", PROMPTS[1])):
            took: dict[bool, list[float]] = {True: [], False: []}
            for user_id in chosen[:10]:  # warm
                for explain in (False, True):
                    _ask(application.recommender, user_id, prompt, explain)
            gc.collect()
            for user_id in chosen:
                for explain in (False, True):
                    took[explain].append(_ask(application.recommender, user_id, prompt, explain))
            added = [a - b for a, b in zip(took[True], took[False], strict=True)]
            found[f"explain_added{name}_p50_ms"] = round(statistics.median(added), 2)
            found[f"explain_added{name}_p95_ms"] = round(float(np.quantile(added, 0.95)), 2)
            found[f"plain{name}_p50_ms"] = round(statistics.median(took[False]), 2)
    finally:
        application.close()
    return found


def _ask(recommender: Recommender, user_id: str, prompt: str | None, explain: bool) -> float:
    request = RecommendationRequest(user_id=user_id, prompt=prompt, explain=explain)
    began = time.perf_counter()
    answer = recommender.recommend(request)
    took = (time.perf_counter() - began) * 1_000
    assert not answer.degraded, answer.degraded
    return took


def rules(world: Trained, requests: int) -> dict[str, Any]:
    """Random requests under random rules. Changes the database of `world`: a log of what was shown."""
    people = world.people[:60]
    with psycopg.connect(world.url) as connection:
        catalogue = Catalogue.read(connection)
        serve_before(connection, catalogue, people)
    application = world.application()
    try:
        outcome = try_many(application.recommender, catalogue, people, requests)
    finally:
        application.close()
    return {
        "rules_broken": sum(outcome.broken.values()),
        "rules_requests": outcome.requests,
        "rules_short": outcome.short,
        "rules_notes": len(outcome.notes),
    }


def diversity(world: Trained, people: int) -> dict[str, Any]:
    """Mean intra-list diversity (1 − mean cosine of two items of a list) by setting, over the same people."""
    with psycopg.connect(world.url) as connection:
        vectors = {
            item_id: np.array(json.loads(vector), np.float64)
            for item_id, vector in connection.execute(
                "SELECT item_id, vector::text FROM item_vectors WHERE model_version = %s", (world.version,)
            )
        }
    chosen = np.random.default_rng(2).permutation(world.people)[:people].tolist()
    application = world.application()
    try:
        means = []
        for setting in SETTINGS:
            lists = [
                [
                    vectors[item.item_id]
                    for item in application.recommender.recommend(
                        RecommendationRequest(user_id=user_id, diversity=setting)
                    ).items
                ]
                for user_id in chosen
            ]
            means.append(float(np.mean([intra_list(np.stack(one)) for one in lists])))
    finally:
        application.close()
    return {
        "diversity_monotone": bool((np.diff(means) >= 0).all()),
        "diversity_by_setting": [round(mean, 4) for mean in means],
    }


def intra_list(vectors: NDArray[np.float64]) -> float:
    """1 − mean cosine of two of `vectors (n, d)`, n ≥ 2 (Ziegler et al. 2005)."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    n = len(unit)
    return float(1 - ((unit.sum(axis=0) ** 2).sum() - n) / (n * (n - 1)))


@contextmanager
def copied(world: Trained) -> Iterator[Trained]:
    """The world with a database and a lake that may be changed; both go afterwards."""
    base, _, options = world.url.partition("?")
    server, name = base.rsplit("/", 1)
    with (
        tempfile.TemporaryDirectory(prefix="larder-loop-explain-copy-") as scratch,
        psycopg.connect(
            world.url.replace(f"/{name}?", "/template1?") if options else f"{server}/template1"
        ) as connection,
    ):
        connection.autocommit = True
        copy = f"{name}_explained"
        connection.execute(f"DROP DATABASE IF EXISTS {copy} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {copy} TEMPLATE {name}")
        lake = Path(scratch) / "lake"
        copytree(Path(world.lake_url.removeprefix("file://")), lake)
        try:
            yield replace(world, url=f"{server}/{copy}" + (f"?{options}" if options else ""), lake_url=lake.as_uri())
        finally:
            connection.execute(f"DROP DATABASE IF EXISTS {copy} WITH (FORCE)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny world: proves the bench, measures nothing")
    parser.add_argument("--work", type=Path, help="keep the trained world here, and go on from it")
    parser.add_argument("--only", default=",".join(SECTIONS), help="comma-separated sections (default: %(default)s)")
    options = parser.parse_args()
    only = tuple(options.only.split(","))
    if unknown := set(only) - set(SECTIONS):
        parser.error(f"there is no section {min(unknown)!r}; known: {', '.join(SECTIONS)}")
    print(json.dumps(measure(options.quick, options.work, only)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
