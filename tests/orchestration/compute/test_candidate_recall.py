"""Candidates offline are those of the serving SQL, and recall counts what is among them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import psycopg
import pytest
from conftest import TODAY
from numpy.typing import NDArray

from inference.candidates import SOURCES, Filters
from inference.sql_files import vector_literal
from inference.store import Store
from orchestration.compute.candidate_recall import Sources, candidate_recall, merge, pick, sources_of
from orchestration.compute.evaluate import Scorer
from orchestration.compute.interactions import Interactions
from orchestration.compute.lists import refresh_co_visitation, refresh_popular_items
from orchestration.compute.splits import Queries, Split
from schemas.events import KINDS
from schemas.ranker import TEXT_DIM

ITEMS, PEOPLE, LIMIT, DIM = 200, 30, 60, 8
DAY = 86_400_000_000
AT = int(TODAY.timestamp() * 1e6)
CHAMPION = "0123456789abcdef"


@pytest.fixture(scope="module")
def split() -> Split:
    """Thirty people with events over 40 days, some hidden; everybody is asked at midnight today. Ten items come tomorrow."""
    generator = np.random.default_rng(3)
    available_at = np.sort(AT - generator.integers(0, 60 * DAY, ITEMS))
    available_at[-10:] = AT + DAY
    rows = []
    for person in range(PEOPLE):
        items = generator.permutation(ITEMS - 10)[: 5 + person]
        times = np.sort(generator.integers(AT - 40 * DAY, AT, len(items)))
        rows += [(person, item, at, generator.random() < 0.1) for item, at in zip(items, times, strict=True)]
        rows.append((person, int(generator.integers(0, ITEMS - 10)), AT, False))
    user, item, at, hidden = (np.array(column) for column in zip(*rows, strict=True))
    events = Interactions(
        np.array([f"u{number:02}" for number in range(PEOPLE)]),
        np.array([f"i{number:03}" for number in range(ITEMS)]),
        user.astype(np.int32),
        item.astype(np.int32),
        at,
        np.where(hidden, KINDS.index("hide"), KINDS.index("view")) + 1,
        np.full(len(rows), np.nan, np.float32),
        available_at,
    )
    label = np.flatnonzero(events.occurred_at == AT)
    train = events.take(events.occurred_at < AT)
    return Split("today", train, Queries(events, label, events.offsets()[events.user[label]], label))


def vectors(seed: int, rows: int, dim: int) -> NDArray[np.float32]:
    """Vectors that halves hold exactly: stored, they are in the same order."""
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float16).astype(np.float32)


def inner(people: NDArray[np.float32], items: NDArray[np.float32]) -> Scorer:
    return lambda queries: people[queries.user] @ items.T


def test_offline_candidates_are_those_of_the_serving_sql(
    split: Split, database: str, connection: psycopg.Connection
) -> None:
    events = split.queries.interactions
    assert events.available_at is not None
    item_vectors, people = vectors(1, ITEMS, DIM), vectors(2, PEOPLE, DIM)
    texts, wishes = vectors(3, ITEMS, TEXT_DIM), vectors(4, PEOPLE, TEXT_DIM)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)  # wishes are searched by cosine
    with connection.cursor().copy("COPY items (item_id, title, available_at) FROM STDIN") as copy:
        for item_id, since in zip(events.item_ids.tolist(), events.available_at.tolist(), strict=True):
            copy.write_row((item_id, item_id, datetime.fromtimestamp(0, UTC) + timedelta(microseconds=since)))
    partition = f"item_vectors_{CHAMPION}"
    connection.execute(f"CREATE TABLE {partition} PARTITION OF item_vectors FOR VALUES IN ('{CHAMPION}')")
    for item_id, vector, text in zip(events.item_ids.tolist(), item_vectors, texts, strict=True):
        connection.execute(
            "INSERT INTO item_vectors (model_version, item_id, vector, text_hash) VALUES (%s, %s, %s, 'h')",
            (CHAMPION, item_id, vector_literal(vector)),
        )
        connection.execute(
            "INSERT INTO text_vectors (item_id, vector, text_hash) VALUES (%s, %s, 'h')",
            (item_id, vector_literal(text)),
        )
    refresh_co_visitation(connection, split.train)
    refresh_popular_items(connection, split.train, TODAY)
    connection.commit()

    offline = pick(
        split.queries, sources_of(split, similarity=inner(people, item_vectors), wish=inner(wishes, texts)), limit=LIMIT
    )
    bits = dict(zip(("user vector", "wish", "co-visitation", "trending", "fresh"), SOURCES.values(), strict=False))
    union = merge(list(offline.values()), LIMIT)
    store = Store(database)
    try:
        for row, start in enumerate(split.queries.start.tolist()):
            own = slice(start, int(split.queries.stop[row]))
            liked = events.item[own][events.kind[own] == KINDS.index("view") + 1]
            found = store.pick_candidates(
                at=TODAY,
                filters=Filters(exclude=events.item_ids[events.item[own]].tolist()),
                limit=LIMIT,
                timeout_ms=5000,
                champion=CHAMPION,
                dim=DIM,
                user_vector=people[row],
                wish_text=wishes[row],
                recent=events.item_ids[list(dict.fromkeys(liked[::-1].tolist()))[:20]].tolist(),
            )
            assert found.item_ids == [str(events.item_ids[item]) for item in union[row] if item >= 0]
            for name, bit in bits.items():
                served = {item for item, source in zip(found.item_ids, found.sources, strict=True) if source & bit}
                ours = {str(events.item_ids[item]) for item in offline[name][row] if item >= 0}
                assert served == ours & set(found.item_ids), (row, name)
                assert ours, (row, name)
    finally:
        store.close()


def test_what_is_had_or_not_there_yet_is_no_candidate(split: Split) -> None:
    queries = split.queries
    for items in pick(queries, sources_of(split), limit=LIMIT).values():
        row, place = np.nonzero(items >= 0)
        assert not queries.seen()[row, items[row, place]].any()
        assert (items < ITEMS - 10).all()


def test_recall_counts_labels_among_the_candidates(split: Split) -> None:
    """A source that knows the answers finds all of them; within the union each item is counted once."""
    target = split.queries.target
    late = Split(split.name, split.train, split.queries.take(~split.queries.seen()[np.arange(PEOPLE), target]))
    counts = np.zeros(ITEMS, np.float32)
    known = sources_of(late)
    told = Sources(
        known.neighbours, known.trending, counts, lambda queries: np.eye(ITEMS, dtype=np.float32)[queries.target]
    )
    found = candidate_recall(late, told, limit=8)
    assert found.by_source["user vector"] == 1.0
    assert found.union == 1.0
    assert found.without["user vector"] < 1.0
    without = candidate_recall(late, known, limit=8)
    assert "user vector" not in without.by_source
    assert without.union == pytest.approx(found.without["user vector"])
    assert without.candidates_mean <= 8
    assert "union" in without.table()


def test_labels_of_one_request_are_asked_once(split: Split) -> None:
    queries = split.queries
    twice = Queries(*(getattr(queries, name) for name in ("interactions",)), *(
        np.concatenate([getattr(queries, name)] * 2) for name in ("label", "start", "stop")
    ))  # fmt: skip
    asked = 0

    def count(part: Queries) -> NDArray[np.float32]:
        nonlocal asked
        asked += len(part)
        return np.zeros((len(part), ITEMS), np.float32)

    doubled = candidate_recall(Split(split.name, split.train, twice), sources_of(split, similarity=count), limit=8)
    assert asked == PEOPLE
    assert doubled.union == candidate_recall(split, sources_of(split, similarity=count), limit=8).union
