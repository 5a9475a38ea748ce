"""Whether the declared conditions are SQL that fits the events: asked of DuckDB over empty tables when definitions load."""

from __future__ import annotations

import re
from collections.abc import Iterable

import duckdb

from orchestration.compute.windows import tile_sql
from schemas.declarations import STATE_COLUMNS, near
from schemas.errors import DefinitionError
from schemas.feature_sql import base_sql
from schemas.features import FeatureView, Merge
from schemas.personal_data import RECENT_DAYS

_EMPTY = (
    "CREATE TEMP TABLE events (event_id TEXT, user_id TEXT, item_id TEXT, kind TEXT, value DOUBLE, "
    "occurred_at TIMESTAMPTZ, known_at TIMESTAMPTZ)",
    "CREATE TEMP TABLE items (item_id TEXT, categories TEXT[])",
)


def bind_views(views: Iterable[FeatureView]) -> None:
    """Raise DefinitionError, naming view and feature, unless every state of `views` can be computed over events."""
    with duckdb.connect() as db:
        for sql in _EMPTY:
            db.execute(sql)
        for view in views:
            if view.ttl_days > RECENT_DAYS:
                raise DefinitionError(
                    f"view {view.name!r} has a ttl of {view.ttl_days} days, and single events stay online for {RECENT_DAYS}: "
                    f"a read would miss the rest; give it {RECENT_DAYS} or less"
                )
            try:
                db.execute(f"EXPLAIN {tile_sql(view)}")
            except duckdb.Error as error:
                _blame(db, view)
                raise DefinitionError(
                    f"the SQL of view {view.name!r} does not fit the events: {_line(error)}"
                ) from error


def _blame(db: duckdb.DuckDBPyConnection, view: FeatureView) -> None:
    """Raise for the first state of `view` that cannot be computed by itself, if there is one."""
    for feature in view.features:
        for state in (state for state in feature.states if state.merge is not Merge.DECAY):
            try:
                db.execute(f"EXPLAIN SELECT {state.sql} AS {state.name} FROM ({base_sql(view.entity)})")
            except duckdb.Error as error:
                unknown = re.search(r'Referenced column "([^"]+)" not found', str(error))
                hint = near(unknown[1], (*STATE_COLUMNS, *view.entity.keys)) if unknown else "; mend the condition"
                why = f"events have no column {unknown[1]!r}{hint}" if unknown else f"{_line(error)}{hint}"
                raise DefinitionError(
                    f"feature {feature.name!r} of view {view.name!r} counts by {state.where or state.aggregate!r}: {why}"
                ) from error


def _line(error: duckdb.Error) -> str:
    return str(error).strip().splitlines()[0]
