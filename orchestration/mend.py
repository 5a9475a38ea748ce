"""`make mend-lake`: put the days of the lake aside whose files are missing or cannot be read, so that they are filled again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import psycopg

from infra import deployment as deployments
from infra import postgres
from orchestration.compute.lake import Lake
from orchestration.compute.mend import mend
from schemas.errors import LarderError, SettingsError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make mend-lake",
        usage="make mend-lake [DRY_RUN=1]",
        description="Read every file of the lake. A day whose file is missing or cannot be read goes back to the file "
        "before it, if there is one; what Postgres still has of it is drained again, and the next `make run` loads the "
        "rest from the source and builds what is stale. The damaged file stays until `make vacuum` removes it.",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what is damaged and what would become of it")
    options = parser.parse_args(arguments)
    try:
        record = deployments.current()
        if deployments.load(record.name) is None:
            raise SettingsError(f"there is no lake in {deployments.home()}: run `make run` first")
        with psycopg.connect(postgres.prepare(record), options="-c TimeZone=UTC") as connection:
            mended = mend(Lake(record.lake_url), connection, dry_run=options.dry_run)
    except LarderError as error:
        print(f"error ({error.type}): {error}", file=sys.stderr)
        return 1
    if not mended:
        print("every file of the lake is there and can be read")
        return 0
    for one in mended:
        damage = one.damage
        print(f"{damage.day}: {damage.path}: {damage.reason}")
        print(
            f"  of its {damage.rows:,} events {one.restored:,} are in the file before it, {one.recent:,} in Postgres, "
            f"{one.waiting:,} have to come from the source again"
        )
    if options.dry_run:
        print("nothing was changed; without DRY_RUN=1 these days are put aside")
        return 1
    print(
        f"{len(mended)} day{'' if len(mended) == 1 else 's'} put aside; `make run` loads what the source still has, and "
        "builds what was built from them again\n"
        "events that were posted, are no longer in Postgres and not in the source are lost; the damaged file stays until "
        "`make vacuum` or `make forget` removes it"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
