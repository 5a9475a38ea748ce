"""`make audit`: writes the bundle of the current deployment and checks it; or checks one that is there, or was handed over.

Checking needs nothing but the folder: `sha256sum -c SHA256SUMS` in it does the same for the files that are listed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import psycopg

from infra import deployment as deployments
from infra import postgres
from infra.audit import bundle
from infra.feature_tables import ensure_view_tables
from schemas.errors import LarderError, SettingsError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make audit", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder to write (default: audit/<date> in the deployment's folder)")
    parser.add_argument("--verify", type=Path, metavar="FOLDER", help="only check this bundle")
    options = parser.parse_args(arguments)
    try:
        folder = options.verify or _write(options.out)
        faults = bundle.verify(folder)
    except LarderError as error:
        print(f"error ({error.type}): {error}", file=sys.stderr)
        return 1
    for fault in faults:
        print(f"  {fault}", file=sys.stderr)
    if faults:
        print(f"{folder}: {len(faults)} files are not what was written; ask for the bundle again", file=sys.stderr)
        return 1
    print(f"checked: {folder}, every file is as it was written; SHA-256 of {bundle.SUMS}: {bundle.digest(folder)}")
    return 0


def _write(out: Path | None) -> Path:
    record = deployments.current()
    if deployments.load(record.name) is None:
        raise SettingsError(f"there is nothing to audit in {deployments.home()}: run `make run` first")
    url = postgres.prepare(record)
    ensure_view_tables(url)
    now = datetime.now(UTC)
    folder = out or record.folder / "audit" / f"{now:%Y-%m-%d}"
    with psycopg.connect(url, options="-c TimeZone=UTC", application_name="larder-audit") as connection:
        # One snapshot for all that is read: figures of two moments would not fit each other.
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        made = bundle.write(folder, connection, record, now)
    print(f"written: {folder}, {len(made.files)} files" + (f", {len(made.missing)} missing:" if made.missing else ""))
    for name, how in made.missing.items():
        print(f"  {name}: {how}")
    return folder


if __name__ == "__main__":
    sys.exit(main())
