"""`make training-set`: features for a table of labels, each as it was known at the label's instant."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import psycopg
from rich.console import Console
from rich.markup import escape

from infra import deployment as deployments
from infra import postgres
from infra.arguments import MakeParser
from orchestration.compute.label_features import LabelFeaturesReport, write_label_features
from orchestration.compute.labels import KEY_COLUMNS, TIME_NAMES
from orchestration.compute.lake import Lake
from schemas.errors import LarderError, SettingsError
from schemas.views import VIEWS

console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = MakeParser(
        "make training-set LABELS=file.parquet OUT=file.parquet [VIEWS=a,b] [TIME=column] [KNOWN_AT=0]",
        prog="python -m orchestration.training_set",
        description="Add features to a table of labels, each as it was known at the label's instant: every row comes back, "
        "in its order, with a column `view.feature` for each feature of the asked views. NULL keys give NULL features. "
        f"The table has key columns ({', '.join(KEY_COLUMNS)}), a time column, and whatever else it likes.",
    )
    parser.add_argument("--labels", required=True, type=Path, help="a .parquet, .csv or .jsonl file")
    parser.add_argument("--out", required=True, type=Path, help="the .parquet file to write; it must not exist yet")
    parser.add_argument(
        "--views",
        help="views to ask, comma-separated (default: every one whose keys the table has); "
        f"known: {', '.join(view.name for view in VIEWS)}",
    )
    parser.add_argument(
        "--time",
        metavar="COLUMN",
        help="the column with each label's instant (default: the only timestamp, or the only one called "
        f"{', '.join(TIME_NAMES)}); times without a zone are taken as UTC",
    )
    parser.add_argument(
        "--no-known-at",
        action="store_true",
        help="count late events from when they happened, as if they had never been late (default: from when they were known)",
    )
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    began = time.monotonic()
    try:
        record = deployments.current()
        if deployments.load(record.name) is None:
            raise SettingsError(f"there is no history yet in {deployments.home()}: run `make run` first")
        with psycopg.connect(postgres.prepare(record), application_name="larder-training-set") as connection:
            report = write_label_features(
                options.labels,
                options.out,
                lake=Lake(record.lake_url),
                connection=connection,
                views=[name.strip() for name in options.views.split(",")] if options.views else None,
                time=options.time,
                known_at=not options.no_known_at,
                progress=lambda line: console.print(f"  {escape(line)}", soft_wrap=True),
            )
    except LarderError as error:
        console.print(f"[red]error[/red] ({error.type}): {escape(str(error))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("\ninterrupted; nothing was written")
        return 130
    _show(report, options.out, time.monotonic() - began)
    return 0


def _show(report: LabelFeaturesReport, out: Path, seconds: float) -> None:
    version = report.version
    console.print(
        f"[bold]{report.rows:,}[/bold] rows, {len(version.features)} features of {', '.join(version.views)}, "
        f"{report.size_bytes / 1e6:.1f} MB in {seconds:.1f} s: {escape(str(out))}",
        soft_wrap=True,
    )
    if report.naive_times:
        console.print(
            f"{report.naive_times:,} times of the column {escape(version.time)} have no zone and were taken as UTC",
            soft_wrap=True,
        )
    never = [name for name, rate in report.null_rates.items() if rate == 1 and report.rows]
    if never:
        console.print(f"NULL in every row: {', '.join(never)}; check keys and times", soft_wrap=True)
    console.print(f"version {version.version}, as described in {escape(out.name)}.json", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
