"""How many people a second `make score-all` scores, reading and writing included, and where its time goes.

    python -m tests.benchmarks.score_all [--quick] [--people N] [--items N] [--workers N] [--export folder]
    python -m tests.benchmarks.score_all --core-only --inputs folder

The first builds a world in a PostgreSQL of its own and scores it; the database runs on the same processors. `--export`
also writes the artefact and the arrays of its people and items to a folder, which the second scores without a database: on
a machine with a GPU, say, which is used where there is one. The last line is one JSON object, `score_all_users_per_s` in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from threadpoolctl import threadpool_limits

from inference.score_all import ON_GPU, Report, open_ranker, score_all
from inference.scores.batch import Sizes, Spent, batches, score
from inference.scores.catalogue import Neighbours, Shelf, read_catalogue, shelf_of
from inference.scores.people import Crossed, People, read_people
from schemas.manifest import MANIFEST_FILE
from tests.benchmarks.features_world import peak_rss_mb
from tests.benchmarks.frame import machine, note

CANDIDATES, KEPT = 200, 50


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small world: proves that it runs, measures nothing")
    parser.add_argument("--people", type=int)
    parser.add_argument("--items", type=int)
    parser.add_argument("--workers", type=int, default=0, help="threads (default: one per processor)")
    parser.add_argument("--repeats", type=int, default=3, help="runs; the median is told")
    parser.add_argument("--export", type=Path, help="write artefact and arrays here")
    parser.add_argument("--core-only", action="store_true", help="score the arrays of --inputs, without a database")
    parser.add_argument("--inputs", type=Path, help="a folder that --export wrote")
    chosen = parser.parse_args(arguments)
    if chosen.core_only:
        if chosen.inputs is None:
            parser.error("--core-only needs --inputs, a folder that --export wrote")
        report = core(chosen.inputs, workers=chosen.workers, repeats=chosen.repeats)
    else:
        report = from_scratch(chosen)
    report |= {"quick": chosen.quick, "machine": machine()}
    for name, value in report.items():
        if name.endswith("_ms_per_user"):
            print(f"{name.removesuffix('_ms_per_user').replace('_', ' '):<14} {value:8.3f} ms per person, all threads")
    print(json.dumps(report))
    return report


def from_scratch(chosen: argparse.Namespace) -> dict[str, Any]:
    """Build a world, export it if that was asked for, measure it."""
    from infra import postgres
    from infra.feature_tables import ensure_view_tables
    from tests.benchmarks.score_all_world import QUICK, Size, build

    size = QUICK if chosen.quick else Size()
    size = replace(size, people=chosen.people or size.people, items=chosen.items or size.items)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        url = postgres.start_embedded(Path(folder) / "pg")
        postgres.migrate(url)
        ensure_view_tables(url)
        note(f"building a world of {size.people:,} people and {size.items:,} items …")
        world = build(url, Path(folder) / "world", size)
        if chosen.export:
            export(world.url, world.folder, chosen.export)
        report = measure(
            world.url, world.artifacts.as_uri(), workers=chosen.workers, repeats=1 if chosen.quick else chosen.repeats
        )
    return report | {"people": size.people, "items": size.items, "ranker": size.ranker}


def measure(url: str, artifacts_url: str, *, workers: int = 0, repeats: int = 3) -> dict[str, Any]:
    """`repeats` whole runs over everybody in a database that has a released model; the figures of the median run."""
    runs: list[Report] = []
    for number in range(repeats):
        with threadpool_limits(1, "blas"):
            runs.append(
                score_all(
                    url,
                    artifacts_url,
                    sizes=Sizes(candidates=CANDIDATES, kept=KEPT),
                    workers=workers,
                    restart=True,
                    say=lambda p: note(f"{p.scored:,} of {p.people:,} people, {p.per_second:,.0f} a second"),
                )
            )
        note(f"run {number + 1} of {repeats}: {runs[-1].per_second:,.0f} people a second")
    middle = sorted(runs, key=lambda run: run.per_second)[len(runs) // 2]
    with psycopg.connect(url) as connection:
        (lists, shortest) = connection.execute(
            "SELECT count(*), min(cardinality(item_ids)) FROM user_scores"
        ).fetchone() or (0, 0)
    assert lists == middle.scored, f"{lists} lists of {middle.scored} people: this measured something else"
    assert shortest, "there is an empty list: this measured something else"
    return {
        "score_all_users_per_s": round(middle.per_second, 1),
        "runs_users_per_s": [round(run.per_second, 1) for run in runs],
        "candidates": CANDIDATES,
        "kept": KEPT,
        "shortest_list": shortest,
        "provider": middle.provider,
        "precision": middle.precision,
        "peak_memory_mb": round(peak_rss_mb()),
    } | _by_step(middle.spent, middle.scored)


def _by_step(spent: Spent, people: int) -> dict[str, float]:
    return {
        f"{step.replace(' ', '_')}_ms_per_user": round(seconds * 1_000 / people, 4)
        for step, seconds in sorted(spent.seconds.items(), key=lambda item: -item[1])
    }


def export(url: str, artifact: Path, folder: Path, most: int = 20_000) -> None:
    """The artefact and, of the first `most` people, what `core` reads."""
    shutil.copytree(artifact, folder / "artifact", dirs_exist_ok=True)
    at = datetime.now(UTC)
    version = json.loads((artifact / MANIFEST_FILE).read_text())
    with (
        psycopg.connect(url, autocommit=True, options="-c TimeZone=UTC") as connection,
        psycopg.connect(url, autocommit=True) as beside,
    ):
        catalogue = read_catalogue(connection, beside, artifact.name, int(version["dim"]), at)
        rows = connection.execute("SELECT DISTINCT user_id FROM user_history ORDER BY 1 LIMIT %s", (most,)).fetchall()
        people, _ = read_people(connection, [row[0] for row in rows], catalogue, at)
    shelf = shelf_of(catalogue, at)
    arrays: dict[str, Any] = {"at": np.array(people.at), "category_count": np.array(shelf.category_count)}
    for field in fields(People):
        if field.name not in ("at", "crossed"):
            arrays[f"people.{field.name}"] = getattr(people, field.name)
    for number, crossed in enumerate(people.crossed):
        for field in fields(Crossed):
            arrays[f"crossed.{number}.{field.name}"] = getattr(crossed, field.name)
    for field in fields(Shelf):
        if field.name not in ("matrix", "neighbours", "category_count", "vectors"):
            arrays[f"shelf.{field.name}"] = getattr(shelf, field.name)
    # They come from half precision: nothing is lost.
    arrays["vectors"] = shelf.vectors.astype(np.float16)
    for field in fields(Neighbours):
        arrays[f"neighbours.{field.name}"] = getattr(shelf.neighbours, field.name)
    np.savez_compressed(
        folder / "inputs.npz",
        **{name: value.astype(np.int32) if value.dtype == np.int64 else value for name, value in arrays.items()},
    )
    note(f"exported {len(people):,} people to {folder}")


def _load(folder: Path) -> tuple[People, Shelf]:
    with np.load(folder / "inputs.npz") as stored:
        read = {name: value.astype(np.int64) if value.dtype == np.int32 else value for name, value in stored.items()}

    def part(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in read.items() if name.startswith(prefix)}

    crossed: list[Crossed] = []
    while mine := part(f"crossed.{len(crossed)}."):
        crossed.append(Crossed(**mine))
    vectors, own = read["vectors"].astype(np.float32), part("shelf.")
    shelf = Shelf(
        vectors=vectors,
        matrix=np.ascontiguousarray(vectors[own["rows"]]),
        category_count=int(read["category_count"]),
        neighbours=Neighbours(**part("neighbours.")),
        **own,
    )
    return People(at=float(read["at"]), crossed=tuple(crossed), **part("people.")), shelf


def core(folder: Path, *, workers: int = 0, repeats: int = 3) -> dict[str, Any]:
    """Score the arrays below `folder`, all at once: everything but the database."""
    people, shelf = _load(folder)
    sizes = Sizes(candidates=CANDIDATES, kept=KEPT)
    ranker = open_ranker(folder / "artifact", None, sizes.candidates)
    if ranker.precision == "fp16":
        sizes = replace(sizes, at_once=ON_GPU.at_once, ahead=ON_GPU.ahead)
    rates: list[float] = []
    spents: list[Spent] = []
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for _ in range(repeats):
            spent = Spent()

            def one(rows: Any, spent: Spent = spent) -> int:
                mine = Spent()
                found = score(people, rows, shelf, ranker, sizes, mine)
                spent.merge(mine)
                return int((found.items[:, 0] >= 0).sum())

            began = time.perf_counter()
            rows = list(batches(people, sizes.ahead))
            scored = sum(pool.map(one, rows))
            assert scored == len(people), f"{scored} of {len(people)} people have a list: this measured something else"
            rates.append(len(people) / (time.perf_counter() - began))
            spents.append(spent)
            note(f"{rates[-1]:,.0f} people a second")
    middle = sorted(range(repeats), key=lambda run: rates[run])[repeats // 2]
    return {
        "score_all_core_users_per_s": round(rates[middle], 1),
        "runs_users_per_s": [round(rate, 1) for rate in rates],
        "people": len(people),
        "items": shelf.size,
        "candidates": CANDIDATES,
        "provider": ranker.provider,
        "precision": ranker.precision,
        "peak_memory_mb": round(peak_rss_mb()),
    } | _by_step(spents[middle], len(people))


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
