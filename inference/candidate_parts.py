"""A request's candidates in parts, one round trip: what is known first is given while Postgres searches for the others.

The statements go out one by one and their answers are taken as they come (inference/wire.py); what they make together is
what `Store.pick_candidates` makes with items in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from inference import cached_items
from inference.cached_items import CachedItems, Picked
from inference.candidates import Filters, PartShape, part_sql
from inference.connections import StoreConnection
from inference.live import utc_day
from inference.sql_files import text_array, vector_literal
from inference.store import PLAN_ONCE, SEARCH, Store, on_postgres, settings_sql
from inference.telemetry import span
from inference.wire import wire

_LOOK_FOR_WISH = "SELECT set_config('hnsw.ef_search', '200', true)"
"""Of the wish a third is wanted, and a look as much wider than that as the person's is than a half."""
_LOOK_FOR_PERSON = f"SELECT set_config('hnsw.ef_search', '{SEARCH['hnsw.ef_search']}', true)"


def pick_in_parts(
    store: Store,
    *,
    at: datetime,
    filters: Filters,
    limit: int,
    timeout_ms: float,
    champion: str,
    dim: int,
    wish: Callable[[], NDArray[np.float32] | None] | None,
    recent: Sequence[str],
    items: CachedItems,
    vector: Callable[[], NDArray[np.float32] | None],
    meanwhile: Callable[[Picked], None],
) -> list[Picked] | None:
    """What `Store.pick_candidates` picks at the present by `items` in memory, in a statement for each `Part`.

    The first looks up what is known of the person while `wish ()` waits for the vector of the wish, if there is one;
    that is searched for while `vector ()` makes the user vector, and that one while `meanwhile` has what the first
    statement gave. They may be called once more, on another connection; what they raise closes it. None where `vector`
    gives none. Raises as `Store` does.
    """
    shape = PartShape(limit, dim, bool(filters.exclude), False, bool(recent))
    known: dict[str, object] = {
        "at": at,
        "today": utc_day(at),
        "exclude": text_array(filters.exclude),
        "champion": champion,
        "recent": text_array(recent),
    }

    def question(connection: StoreConnection) -> list[Picked] | None:
        with wire(connection) as pipeline:
            pipeline.ask(settings_sql(connection.server_ms(), SEARCH | PLAN_ONCE), wanted=False)
            pipeline.ask(part_sql("listed", shape), known)
            pipeline.flush()
            listed = None
            text = wish() if wish is not None else None
            if text is not None:
                # Encoding it took longer than the first statement, whose items the second one looks at.
                listed = cached_items.picked_of(pipeline.row(), items)
                known["wish_text"], known["listed"] = vector_literal(text), text_array(listed.named)
                pipeline.ask(_LOOK_FOR_WISH, wanted=False)
                pipeline.ask(part_sql("wished", shape._replace(wishes=True)), known)
                pipeline.flush()
                pipeline.ask(_LOOK_FOR_PERSON, wanted=False)
            found = vector()
            if found is None:
                return None
            known["user_vector"] = vector_literal(found)
            pipeline.ask(part_sql("near", shape._replace(wishes=text is not None)), known)
            pipeline.flush()
            if listed is None:  # it may be there and empty
                listed = cached_items.picked_of(pipeline.row(), items)
            meanwhile(listed)
            parts = [listed]
            if text is not None:
                row = pipeline.row()
                parts = [cached_items.with_likeness(listed, row), cached_items.picked_of(row, items)]
            return [*parts, cached_items.picked_of(pipeline.row(), items)]

    attributes = on_postgres(3 + (wish is not None)) | {"recsys.items.cached": True}
    with span("db pick_candidates", kind="client", attributes=attributes):
        return store.ask(question, timeout_ms)
