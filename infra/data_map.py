"""`make data-map`: writes docs/data-map.md, what personal data lies where, why, how long and who may read it.

From the declaration (schemas/personal_data.py), the tables' own columns (schemas/tables.py) and the roles (schemas/roles.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import psycopg
from sqlalchemy import Table

from schemas import online_sql, roles, tables
from schemas.features import FeatureView
from schemas.personal_data import Place, places
from schemas.views import VIEWS

DOCUMENT = Path(__file__).parents[1] / "docs" / "data-map.md"
PERSONAL_COLUMNS = ("user_id", "event_id", "user_hash")
"""A table with one of these holds personal data."""
_INTRODUCTION = """\
# What personal data lies where

Written by `make data-map` from the tables and from `schemas/personal_data.py`; a test fails while it differs, or while a
table with a person's or an event's id is missing here. How people see, correct and end it: [privacy](privacy.md).

Whoever has a person's id can have all of it: as a copy (`make export`, `POST /people/{user_id}/export`) and gone
(`make forget`, `POST /people/{user_id}/forget`). What ends by age is deleted once a day by the Dagster job `retention`.
"""


def declared_tables(views: Iterable[FeatureView] = VIEWS) -> list[tuple[str, tuple[str, ...]]]:
    """`(schema.table, columns)` of every table of ours: the metadata's, and those of the declared views."""
    views = tuple(views)
    found = [(f"public.{table.name}", _columns(table)) for table in tables.metadata.sorted_tables]
    found += [(f"features.{view.name}", _columns(tables.view_table(view))) for view in views]
    for entity in online_sql.entities(views):
        dates = tuple(name for view in online_sql.views_of(entity, views) for name in (f"{view.name}_date", view.name))
        found.append((online_sql.rows_table(entity), (*entity.keys, *dates)))
        states = tuple(state.name for state in online_sql.tile_states(entity, views))
        found.append((online_sql.tiles_table(entity), (*entity.keys, "day", *states)))
    return found


def undeclared(declared: Iterable[Place], columns: Mapping[str, Iterable[str]]) -> list[str]:
    """The tables of `columns` that hold personal data and have no place."""
    known = {place.table for place in declared}
    return sorted(
        table for table, names in columns.items() if set(names) & set(PERSONAL_COLUMNS) and table not in known
    )


def columns_of(connection: psycopg.Connection) -> dict[str, tuple[str, ...]]:
    """The columns of every table that a database really has, partitions with their parents."""
    rows = connection.execute(
        "SELECT n.nspname || '.' || c.relname, array_agg(a.attname::text ORDER BY a.attnum) FROM pg_class AS c "
        "JOIN pg_namespace AS n ON n.oid = c.relnamespace JOIN pg_attribute AS a ON a.attrelid = c.oid "
        "WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND a.attnum > 0 AND NOT a.attisdropped "
        "AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' GROUP BY 1"
    ).fetchall()
    return {table: tuple(columns) for table, columns in rows}


def text(views: Iterable[FeatureView] = VIEWS) -> str:
    """The document."""
    views = tuple(views)
    columns = dict(declared_tables(views))
    parts = [_INTRODUCTION, "## Tables\n"]
    all_places = places(views)
    parts += [_section(place, columns[place.table], views) for place in all_places if place.table]
    parts.append("## Files, logs and everything else\n")
    parts += [_section(place, (), views) for place in all_places if not place.table]
    others = sorted(set(columns) - {place.table for place in all_places})
    parts.append(
        "## Tables without personal data\n\n" + ", ".join(f"`{table}`" for table in others) + ".\n\n"
        "`api_keys` names what a key was made for in its maker's words: make keys for applications, not for people.\n"
    )
    return "\n".join(parts)


def may_read(table: str, views: Iterable[FeatureView] = VIEWS) -> str:
    """Which roles read `table`, in words."""
    owner = roles.ORCHESTRATOR if _of_data(table) else roles.OWNER
    found = [f"`{roles.OWNER}`" + (" (its owner)" if owner == roles.OWNER else "")]
    rights = roles.ORCHESTRATOR_RIGHTS.get(table, "SELECT")
    if "SELECT" in rights or _of_data(table):
        found.append(f"`{roles.ORCHESTRATOR}`" + (" (its owner)" if owner == roles.ORCHESTRATOR else ""))
    reads = {**roles.READS, **roles.view_reads(views)}
    if table in reads:
        listed = ", ".join(f"`{column}`" for column in reads[table])
        found.append(f"`{roles.FUNCTION}`" + (f" (only {listed})" if listed else ""))
    return ", ".join(found)


def _section(place: Place, columns: tuple[str, ...], views: tuple[FeatureView, ...]) -> str:
    lines = [f"### {place.name}", ""]
    if place.table:
        lines.append(f"- table: `{place.table}` ({', '.join(f'`{column}`' for column in columns)})")
    lines += [f"- what: {place.what}", f"- why: {place.why}", f"- how long: {place.kept}"]
    if place.expiry is not None:
        lines.append(
            f"- ended by: job `retention`, {place.expiry.days} days after `{place.expiry.column}`"
            + ("" if place.expiry.only == "true" else f", where `{place.expiry.only}`")
        )
    lines.append(f"- who may read it: {may_read(place.table, views) if place.table else place.readers}")
    return "\n".join(lines) + "\n"


def _columns(table: Table) -> tuple[str, ...]:
    return tuple(column.name for column in table.columns)


def _of_data(table: str) -> bool:
    return not table.startswith("public.") or table in roles.ORCHESTRATOR_OWNS


def main() -> int:
    parser = argparse.ArgumentParser(prog="make data-map", description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCUMENT, help="file to write (default: docs/data-map.md)")
    options = parser.parse_args()
    options.out.write_text(text(), encoding="utf-8")
    print(f"written: {options.out.name}, {len(places())} places")
    return 0


if __name__ == "__main__":
    sys.exit(main())
