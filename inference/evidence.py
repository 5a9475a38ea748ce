"""What an explanation asks of the database: who had both, and how well an item fits the wish less a clause. One round trip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inference.connections import StoreConnection
from inference.sql_files import text_array, vector_literal
from inference.store import PLAN_ONCE, Store, set_locally
from inference.telemetry import span

# From the shown items, of which there are few: each has at most a hundred neighbours.
_PEOPLE = (
    "SELECT item_id, neighbour_id, people FROM co_visitation "
    "WHERE item_id = ANY(%(shown)s::text[]) AND neighbour_id = ANY(%(had)s::text[])"
)
_FITS = "SELECT item_id, {columns} FROM text_vectors WHERE item_id = ANY(%(placed)s::text[])"


@dataclass(frozen=True, slots=True)
class Evidence:
    """`people (m, n)`: how many people had both item m of the history and shown item n, 0 where it is not known.

    `fits (w, n + r)`: cosine of wish w and the text of each shown item, then of each rival; 0 without a text.
    """

    people: NDArray[np.int64]
    fits: NDArray[np.float32]


def read_evidence(
    store: Store,
    shown: Sequence[str],
    rivals: Sequence[str],
    had: Sequence[str],
    wishes: Sequence[NDArray[np.float32]],
    timeout_ms: float,
) -> Evidence:
    """Evidence about n `shown` items, r `rivals`, m items `had` and `wishes (384,)` each. Raises as any question to a Store."""
    place = {item: number for number, item in enumerate((*shown, *rivals))}
    row = {item: number for number, item in enumerate(had)}
    parameters: dict[str, object] = {
        "shown": text_array(shown),
        "had": text_array(had),
        "placed": text_array(list(place)),
    }
    parameters |= {f"wish_{number}": vector_literal(wish) for number, wish in enumerate(wishes)}
    columns = ", ".join(f"1 - (vector <=> %(wish_{number})s::vector)" for number in range(len(wishes)))

    def question(connection: StoreConnection) -> tuple[list[tuple[str, str, int]], list[tuple[object, ...]]]:
        with connection.pipeline():
            set_locally(connection, connection.server_ms(), PLAN_ONCE)
            people = connection.cursor(binary=True).execute(_PEOPLE, parameters, prepare=True)
            fits = None
            if wishes:
                fits = connection.cursor(binary=True).execute(_FITS.format(columns=columns), parameters, prepare=True)
        return people.fetchall(), fits.fetchall() if fits is not None else []

    attributes: dict[str, str | int] = {"db.system.name": "postgresql", "db.operation.batch.size": 2 + bool(wishes)}
    with span("db read_evidence", kind="client", attributes=attributes):
        both, fitting = store.ask(question, timeout_ms)
    people = np.zeros((len(had), len(shown)), np.int64)
    for item, neighbour, count in both:
        people[row[neighbour], place[item]] = count
    fits = np.zeros((len(wishes), len(place)), np.float32)
    for item_id, *cosines in fitting:
        fits[:, place[str(item_id)]] = np.array(cosines, np.float32)
    return Evidence(people, fits)
