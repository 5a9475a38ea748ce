"""Names and shapes of what asset pages show: the same numeric keys every time, so that they become charts."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import dagster as dg
from sqlalchemy import Table

from schemas.checks import Measures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = "rows"
EVENTS = "events"
SECONDS = "seconds"
NULL_RATE = "null_rate"
FAILED_CHECKS = "failed_checks"
LATE_RATE = "late_rate"
STALE = "stale_partitions"
ROWS_OVER_DAY_BEFORE = "rows_over_day_before"
OWNER = "team:recommendations"

MAX_PLOT_BYTES = 50_000


def over_day_before(measures: Measures) -> dict[str, float]:
    """The entry for rows against the day before: nothing where that day has none, for infinity is no chart."""
    return {name: measures[name] for name in (ROWS_OVER_DAY_BEFORE,) if name in measures}


def column_schema(table: Table) -> dict[str, dg.TableSchemaMetadataValue]:
    """The asset's column schema from the table it fills."""
    columns = [
        dg.TableColumn(
            column.name,
            type=str(column.type).lower(),
            description=column.comment,
            constraints=dg.TableColumnConstraints(nullable=bool(column.nullable)),
        )
        for column in table.columns
    ]
    return {"dagster/column_schema": dg.MetadataValue.table_schema(dg.TableSchema(columns))}


def plot(title: str, draw: Callable[[Axes], None]) -> dg.MarkdownMetadataValue:
    """A small picture for an asset page: `draw` paints on one pair of axes."""
    from matplotlib.figure import Figure  # drawing is rare, importing it is slow

    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    draw(axes)
    for dpi in (110, 80, 60):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi)
        if buffer.tell() <= MAX_PLOT_BYTES:
            break
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{encoded})")


def markdown_table(header: list[str], rows: list[list[str]]) -> dg.MarkdownMetadataValue:
    """A table for an asset page."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return dg.MetadataValue.md("\n".join(lines))
