"""Everybody's list, computed ahead by the core that answers requests: what the ladder falls back on when no model can rank.

    next people ─▶ read (a few questions a chunk) ─▶ vectors ─▶ candidates ─▶ rank ─▶ best ─▶ one transaction a chunk

People go by in the order of their ids, a chunk at a time. While threads work on one chunk, the next is read and the one
before is written. A run that was stopped goes on behind the last person it wrote (inference/scores/table.py). Each chunk is
scored as of its own instant, the present, as a request would be; the items are read once and again after `REFRESH`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
from numpy.typing import NDArray

from inference import artifacts
from inference.cuda import Bucket, CudaSession, device_count
from inference.live import utc_day
from inference.ranker import Ranker
from inference.scores import table
from inference.scores.batch import Scored, Sizes, Spent, batches, score
from inference.scores.catalogue import Catalogue, read_catalogue, shelf_of
from inference.scores.people import next_people, read_people
from inference.scores.table import Run, packed, packed_ids
from schemas.errors import ScoresError
from schemas.ranker import MAX_CANDIDATES, MAX_HISTORY

logger = logging.getLogger(__name__)

CHUNK = 2_048
"""People to a transaction: what a stop in the middle costs, and what lies in memory at a time."""
REFRESH = timedelta(minutes=10)
"""How old the items may be: those that arrive, and what happens to them, count for people scored after that."""
ON_GPU = Sizes(at_once=256, ahead=256)
_HISTORIES = (32, MAX_HISTORY)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: `scored` of about `people`, `per_second` since this start."""

    scored: int
    people: int
    per_second: float


@dataclass(slots=True)
class Report:
    """What a start of a run did. `seconds` by step are summed over all threads."""

    version: str
    resumed: bool
    before: int
    """People whom earlier starts of the run had scored."""
    scored: int = 0
    refused: int = 0
    """People who were forgotten, or asked to be, between being read and being written."""
    gone: int = 0
    """Lists dropped, of people who are not there any more."""
    seconds: float = 0.0
    featureless: int = 0
    """People scored while no partition of their features was fit to be read."""
    provider: str = ""
    precision: str = ""
    spent: Spent = field(default_factory=Spent)

    @property
    def per_second(self) -> float:
        return self.scored / self.seconds if self.seconds else 0.0


def score_all(
    url: str,
    artifacts_url: str,
    *,
    sizes: Sizes | None = None,
    version: str | None = None,
    restart: bool = False,
    workers: int = 0,
    chunk: int = CHUNK,
    say: Callable[[Progress], None] = lambda _: None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Report:
    """Score everybody in the database at `url` with the champion, or with `version`, and keep their lists.

    `workers` threads compute, as many as there are processors by default; each should have its matrix products to
    itself (OPENBLAS_NUM_THREADS=1). `say` hears of every chunk that was written, and may raise to end the run, as Ctrl-C
    does: what was written stays, and the next call goes on from there. Raises ScoresError if nothing is released, another
    run is under way or another model was released meanwhile, ArtifactError if the model cannot be used.
    """
    sizes = sizes or Sizes()
    check(sizes)
    with (
        psycopg.connect(url, autocommit=True, options="-c TimeZone=UTC", application_name="larder-score-all") as reads,
        psycopg.connect(url, autocommit=True, options="-c TimeZone=UTC", application_name="larder-score-all") as beside,
        psycopg.connect(url, options="-c TimeZone=UTC", application_name="larder-score-all") as writes,
    ):
        table.lock(writes)
        follows = version is None
        version, path = _wanted(reads, version)
        ranker = open_ranker(artifacts.fetch(artifacts_url, path), version, sizes.candidates)
        if ranker.precision == "fp16":
            sizes = replace(sizes, at_once=ON_GPU.at_once, ahead=ON_GPU.ahead)
        run = table.begin(writes, version, sizes.candidates, sizes.kept, restart=restart, now=now())
        work = _Work(reads, beside, writes, ranker, replace(run, follows=follows), sizes, chunk, say, now)
        return work.through(workers or os.cpu_count() or 1)


def check(sizes: Sizes) -> None:
    """Raises ScoresError for sizes that make no lists."""
    if not 10 <= sizes.candidates <= MAX_CANDIDATES:
        raise ScoresError(f"CANDIDATES is {sizes.candidates}; give a whole number from 10 to {MAX_CANDIDATES}")
    if not 1 <= sizes.kept <= sizes.candidates:
        raise ScoresError(
            f"PER_USER is {sizes.kept} of {sizes.candidates} candidates; give a whole number from 1 to CANDIDATES"
        )


def open_ranker(folder: Path, version: str | None, candidates: int) -> Ranker:
    """The ranker in `folder` as batches use it: a thread per call on the CPU, and wide buckets where there is a GPU."""

    def open_gpu(file: Path) -> CudaSession:
        return CudaSession(file, [Bucket(ON_GPU.at_once, h, n) for h in _HISTORIES for n in (1, candidates)])

    ranker = Ranker(folder, version=version, threads=1, open_gpu=open_gpu if device_count() else None)
    if ranker.warming is not None:
        ranker.warming.join()  # there is time: nobody waits for the first person's list
    return ranker


def _wanted(connection: psycopg.Connection, version: str | None) -> tuple[str, str]:
    if version is None:
        found = table.champion(connection)
        if found is None:
            raise ScoresError(
                "no model is released yet, so there is nothing to score with; `make run` trains and releases one"
            )
        return found
    row = connection.execute(
        "SELECT m.path, g.passed FROM model_versions AS m LEFT JOIN gate_records AS g USING (version) WHERE version = %s",
        (version,),
    ).fetchone()
    if row is None:
        raise ScoresError(f"there is no model {version!r}; leave VERSION out to score with the one that serves")
    if not row[1]:
        raise ScoresError(f"model {version} did not pass its gate, so nobody is shown what it says; score with another")
    return version, row[0]


@dataclass(slots=True)
class _Chunk:
    users: list[str]
    at: datetime
    last: str
    futures: list[Future[tuple[Scored, list[tuple[bytes, bytes]], Spent]]]


@dataclass(slots=True)
class _Work:
    """One start of a run."""

    reads: psycopg.Connection
    beside: psycopg.Connection
    """Of half of the items' rows, at the same time."""
    writes: psycopg.Connection
    ranker: Ranker
    run: Run
    sizes: Sizes
    chunk: int
    say: Callable[[Progress], None]
    now: Callable[[], datetime]
    catalogue: Catalogue | None = None
    read_at: datetime | None = None
    ids: list[bytes] = field(default_factory=list)

    def through(self, workers: int) -> Report:
        began = time.perf_counter()
        report = Report(self.run.version, self.run.resumed, self.run.scored)
        (people,) = self.reads.execute(
            "SELECT count(*) FROM (SELECT user_id FROM people UNION SELECT user_id FROM user_history) AS p"
        ).fetchone() or (0,)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="score-all")
        try:
            waiting: _Chunk | None = None
            after: str | None = self.run.after
            while after is not None or waiting is not None:
                upcoming = None
                if after is not None:
                    upcoming, after = self._begin(pool, after, report)
                if waiting is not None:
                    self._write(waiting, report)
                    report.seconds = time.perf_counter() - began
                    self.say(Progress(report.before + report.scored, people, report.per_second))
                waiting = upcoming
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        report.gone = table.finish(self.writes, self.run, report.before + report.scored, report.seconds, self.now())
        report.seconds = time.perf_counter() - began
        report.provider, report.precision = self.ranker.provider, self.ranker.precision
        if report.featureless:
            logger.warning(
                "%d people were scored without their features: no partition of them is fit to be read; materialise them",
                report.featureless,
            )
        return report

    def _begin(self, pool: ThreadPoolExecutor, after: str, report: Report) -> tuple[_Chunk | None, str | None]:
        """Read the people behind `after` and hand them to the threads; also the last one looked at, None at the end."""
        began = time.perf_counter()
        users, last = next_people(self.reads, after, self.chunk)
        if last is None or not users:
            return None, last
        at = self.now()
        catalogue = self._items(at)
        began = report.spent.add("read items", began)
        people, settled = read_people(self.reads, users, catalogue, at)
        if not settled:
            report.featureless += len(users)
        began = report.spent.add("read people", began)
        shelf = shelf_of(catalogue, at)
        ids = self.ids

        def one(rows: NDArray[np.int64]) -> tuple[Scored, list[tuple[bytes, bytes]], Spent]:
            spent = Spent()
            found = score(people, rows, shelf, self.ranker, self.sizes, spent)
            since = time.perf_counter()
            lists = [
                packed(items[items >= 0].tolist(), scores[items >= 0], ids)
                for items, scores in zip(found.items, found.scores, strict=True)
            ]
            spent.add("pack", since)
            return found, lists, spent

        futures = [pool.submit(one, rows) for rows in batches(people, self.sizes.ahead)]
        report.spent.add("read items", began)
        return _Chunk(users, at, last, futures), last

    def _items(self, at: datetime) -> Catalogue:
        """The items, read anew when they are too old for `at`."""
        old = self.read_at is None or at - self.read_at > REFRESH or utc_day(at) != utc_day(self.read_at)
        if self.catalogue is None or old:
            self.catalogue = read_catalogue(self.reads, self.beside, self.run.version, self.ranker.dim, at)
            self.read_at, self.ids = at, packed_ids(self.catalogue.item_ids)
        return self.catalogue

    def _write(self, chunk: _Chunk, report: Report) -> None:
        lists: list[tuple[bytes, bytes]] = [(b"", b"")] * len(chunk.users)
        for future in chunk.futures:
            found, mine, spent = future.result()
            report.spent.merge(spent)
            for row, one in zip(found.rows.tolist(), mine, strict=True):
                lists[row] = one
        began = time.perf_counter()
        written = table.write(self.writes, self.run, chunk.at, chunk.users, lists)
        report.spent.add("write", began)
        report.scored += written
        report.refused += len(chunk.users) - written
