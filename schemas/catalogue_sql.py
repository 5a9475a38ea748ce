"""How a process that keeps items in memory knows that they still are what the tables say.

Triggers note in `catalogue_changes` that a statement wrote to the items, their vectors or their packed features. Who has
read all three at one moment, and the log's state with them, has to ask only for that state again: as long as it is the
same, so are they.
"""

from __future__ import annotations

from typing import Any

import psycopg

from schemas import online_sql
from schemas.features import ITEM

STATE = "(SELECT md5(coalesce(string_agg(change_id::text, ',' ORDER BY change_id), '')) FROM catalogue_changes)"
"""The state of the log, a text: which changes are in it. A transaction that began earlier may commit later, with smaller ids:
hence no maximum. An id never comes again, so no state does."""

ITEMS, VECTORS, ROWS = "public.items", "public.item_vectors", online_sql.rows_table(ITEM)
WATCHED = (ITEMS, VECTORS, ROWS)
"""The tables whose triggers note changes."""

_TRIGGER = "catalogue_changed"
_NOTE = "EXECUTE FUNCTION public.note_catalogue_change"
_TELL_ROWS = {
    # An ingest asks for all items to be written, and most often changes none.
    ITEMS: {
        "inserted": f"INSERT ON {{table}} REFERENCING NEW TABLE AS changed FOR EACH STATEMENT {_NOTE}('changed')",
        "updated": f"UPDATE ON {{table}} REFERENCING NEW TABLE AS changed FOR EACH STATEMENT {_NOTE}('changed')",
        "removed": f"DELETE OR TRUNCATE ON {{table}} FOR EACH STATEMENT {_NOTE}()",
    }
}
_TELL = {"written": f"INSERT OR UPDATE OR DELETE OR TRUNCATE ON {{table}} FOR EACH STATEMENT {_NOTE}()"}

MISSING = " UNION ALL ".join(
    f"SELECT '{table}' WHERE (SELECT count(*) FROM pg_trigger WHERE tgrelid = to_regclass('{table}') "
    f"AND starts_with(tgname, '{_TRIGGER}') AND tgenabled = 'O') < {len(_TELL_ROWS.get(table, _TELL))}"
    for table in WATCHED
)
"""The watched tables whose writes nothing would note: with one of them the log's state says nothing."""


def watch(connection: psycopg.Connection[Any], *tables: str) -> None:
    """Put the triggers on those of `tables` that are there without them; for their owner."""
    missing = {name for (name,) in connection.execute(MISSING)}
    for table in tables:
        if table not in missing or connection.execute("SELECT to_regclass(%s)", (table,)).fetchone() == (None,):
            continue
        for name, told in _TELL_ROWS.get(table, _TELL).items():
            connection.execute(f"CREATE OR REPLACE TRIGGER {_TRIGGER}_{name} AFTER {told.format(table=table)}".encode())
