"""`make features`: the features of one or more entities as a request reads them, with status and age, as a table."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inference.features import FeatureBlock, Status, read_features
from inference.store import Store
from infra import deployment as deployments
from infra import postgres
from infra.arguments import MakeParser
from infra.feature_tables import ensure_view_tables
from orchestration.explain import instant_of, key_of, view_named
from schemas.errors import LarderError, SettingsError
from schemas.views import VIEWS

console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = MakeParser(
        "make features VIEW=a,b KEY=… [AT=instant]",
        prog="python -m orchestration.features",
        description="Read features as a request does: each value with its status and its age. "
        "`python -m orchestration.explain` shows the rows behind them. In Python: inference.features.read_features.",
    )
    parser.add_argument(
        "--view", required=True, help=f"feature views, comma separated: {', '.join(view.name for view in VIEWS)}"
    )
    parser.add_argument(
        "--key",
        required=True,
        action="append",
        help='an entity; of several columns "a,b" or, where an id holds a comma, ["a","b"]; may be repeated',
    )
    parser.add_argument("--at", help="the instant of the read, such as 2030-01-31T12:00:00Z (default: the present)")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    try:
        views = [view_named(name.strip()) for name in options.view.split(",")]
        keys = {view: [key_of(view, text) for text in options.key] for view in views}
        at = None if options.at is None else instant_of(options.at)
        record = deployments.current()
        if deployments.load(record.name) is None:
            raise SettingsError(f"there is nothing to read in {deployments.home()}: run `make run` first")
        url = postgres.prepare(record)
        ensure_view_tables(url)
        store = Store(url)
        try:
            found = read_features(store, keys, at=at, timeout_ms=30_000)
        finally:
            store.close()
    except LarderError as error:
        console.print(f"[red]error[/red] ({error.type}): {escape(str(error))}", soft_wrap=True)
        return 1
    for block in found.values():
        _show(block)
    return 0


def _show(block: FeatureBlock) -> None:
    console.print(f"[bold]{block.view.name}[/bold] at {block.at:%Y-%m-%d %H:%M:%S} UTC", soft_wrap=True)
    table = Table()
    for name in (*block.view.entity.keys, "feature", "status", "value", "age"):
        table.add_column(name, justify="right" if name in ("value", "age") else "left", overflow="fold")
    for row, key in enumerate(block.keys):
        for index, name in enumerate(block.names):
            present = bool(block.valid[row, index])
            table.add_row(
                *(escape(part) if not index else "" for part in key),
                name,
                Status(block.status[row, index]).name,
                f"{block.values[row, index]:,.6g}" if present else "–",
                _age(float(block.age_seconds[row])),
                end_section=index == len(block.names) - 1,
            )
    console.print(table)


def _age(seconds: float) -> str:
    return "–" if seconds != seconds else f"{seconds:,.0f} s"


if __name__ == "__main__":
    sys.exit(main())
