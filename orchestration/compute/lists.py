"""Lists that need no model: what people went on to after an item, what is popular, trending and new."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import psycopg

from orchestration.compute.co_visitation import WindowedPopularity, co_visitation, popularity
from orchestration.compute.interactions import Interactions

NEIGHBOURS = 100
LIST_LENGTH = 500
TRENDING_DAYS = 7
FRESH_DAYS = 30


@dataclass(frozen=True, slots=True)
class ListReport:
    """Rows written per list."""

    rows: dict[str, int]


def refresh_co_visitation(connection: psycopg.Connection[Any], interactions: Interactions) -> ListReport:
    """Replace the co-visitation table in one transaction."""
    neighbours = co_visitation(interactions, k=NEIGHBOURS)
    item_ids = interactions.item_ids.tolist()
    rows = 0
    with connection.transaction():
        connection.execute("LOCK TABLE co_visitation IN SHARE ROW EXCLUSIVE MODE")
        connection.execute("DELETE FROM co_visitation")
        with connection.cursor().copy(
            "COPY co_visitation (item_id, rank, neighbour_id, score, people) FROM STDIN"
        ) as copy:
            for item, (others, scores, counts) in enumerate(
                zip(neighbours.item.tolist(), neighbours.score.tolist(), neighbours.people.tolist(), strict=True)
            ):
                for rank, (other, score, count) in enumerate(zip(others, scores, counts, strict=True), start=1):
                    if other >= 0 and score > 0:
                        copy.write_row((item_ids[item], rank, item_ids[other], score, count))
                        rows += 1
    return ListReport({"co_visitation": rows})


def refresh_popular_items(connection: psycopg.Connection[Any], interactions: Interactions, now: datetime) -> ListReport:
    """Replace the lists `all_time`, `trending` (last 7 days, filled up from all time) and `fresh` (newest arrivals)."""
    counts = popularity(interactions)
    recent = WindowedPopularity(interactions, days=TRENDING_DAYS).at(int(now.timestamp() * 1e6))
    lists = {
        "all_time": _top(counts),
        "trending": _top(recent + counts / max(float(counts.max(initial=0)), 1.0) * 1e-3),
    }
    item_ids = interactions.item_ids.tolist()
    with connection.transaction():
        connection.execute("LOCK TABLE popular_items IN SHARE ROW EXCLUSIVE MODE")
        connection.execute("DELETE FROM popular_items")
        for name, rows in lists.items():
            with connection.cursor().copy("COPY popular_items (list, rank, item_id, score) FROM STDIN") as copy:
                for rank, (item, score) in enumerate(rows, start=1):
                    copy.write_row((name, rank, item_ids[item], score))
        fresh = connection.execute(
            "INSERT INTO popular_items (list, rank, item_id, score) SELECT 'fresh', "
            "row_number() OVER (ORDER BY available_at DESC, item_id), item_id, extract(epoch FROM available_at) FROM items "
            "WHERE available_at > %s AND available_at <= %s ORDER BY available_at DESC, item_id LIMIT %s",
            (now - timedelta(days=FRESH_DAYS), now, LIST_LENGTH),
        )
    return ListReport({name: len(rows) for name, rows in lists.items()} | {"fresh": fresh.rowcount})


def _top(scores: np.ndarray[Any, np.dtype[np.float32]]) -> list[tuple[int, float]]:
    order = np.argsort(-scores, kind="stable")[:LIST_LENGTH]
    return [(int(item), float(scores[item])) for item in order if scores[item] > 0]
