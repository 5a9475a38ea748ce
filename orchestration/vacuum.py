"""`make vacuum`: delete the files that killed runs left in the lake. The Dagster job of the same end is in orchestration/upkeep.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import psycopg

from infra import deployment as deployments
from infra import postgres
from infra.arguments import MakeParser
from orchestration.compute.lake import Lake
from orchestration.compute.vacuum import vacuum
from schemas.errors import LarderError, SettingsError

HOURS = 24.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = MakeParser(
        "make vacuum [HOURS=24] [DRY_RUN=1]",
        prog="python -m orchestration.vacuum",
        description="Delete the lake's files that no row of the database names: what killed runs left, and what was "
        "replaced and is kept for readers that began earlier. The current file of a day is never touched.",
    )
    parser.add_argument(
        "--hours", type=float, default=HOURS, help=f"how long nobody may have read a file (default: {HOURS:g})"
    )
    parser.add_argument("--dry-run", action="store_true", help="only list the files")
    options = parser.parse_args(arguments)
    try:
        record = deployments.current()
        if deployments.load(record.name) is None:
            raise SettingsError(f"there is no lake in {deployments.home()}: run `make run` first")
        with psycopg.connect(postgres.prepare(record), options="-c TimeZone=UTC") as connection:
            gone = vacuum(Lake(record.lake_url), connection, hours=options.hours, dry_run=options.dry_run)
    except LarderError as error:
        print(f"error ({error.type}): {error}", file=sys.stderr)
        return 1
    for orphan in gone:
        print(f"{orphan.path}  {orphan.size_bytes:,} bytes  written {orphan.written_at:%Y-%m-%d %H:%M} UTC")
    size = sum(orphan.size_bytes for orphan in gone)
    print(
        f"{len(gone)} files, {size:,} bytes {'would be' if options.dry_run else 'were'} deleted from {record.lake_url}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
