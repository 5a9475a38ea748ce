"""`make export`: all that is held of a person in the current deployment, as JSON. The Dagster job of the same end is in orchestration/people.py."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from infra import deployment as deployments
from infra import postgres
from infra.arguments import MakeParser, person_id
from infra.feature_tables import ensure_view_tables
from orchestration.compute import person_export
from orchestration.compute.lake import Lake
from schemas.errors import LarderError, SettingsError

EXPLANATION = """\
Writes everything held of one person: their events in the lake and in Postgres, history, profile, features, what they said
to being personalised, quarantined rows that name them, their rows of training sets. docs/data-map.md says what is where.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = MakeParser(
        "make export USER_ID=… [OUT=file] [REQUEST=1]",
        variables={"user": "USER_ID"},
        prog="python -m orchestration.export_person",
        description=EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--user",
        metavar="ID",
        required=True,
        help="whose; - reads the id from standard input, where no list of processes shows it",
    )
    parser.add_argument("--out", type=Path, help="file to write, for its owner's eyes only (default: standard output)")
    parser.add_argument(
        "--request",
        action="store_true",
        help="only store the request and print its receipt, for the Dagster job export_person and for GET …/export/<receipt>",
    )
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    try:
        record = deployments.current()
        if deployments.load(record.name) is None:
            raise SettingsError(f"there is nothing to export in {deployments.home()}: run `make run` first")
        user_id = person_id(options.user)
        url = postgres.prepare(record)
        ensure_view_tables(url)
        if options.request:
            print(person_export.request(url, user_id))
            # Beside what a script reads.
            print(
                "the Dagster job export_person gathers everything with this id, its sensor by itself", file=sys.stderr
            )
            return 0
        lake = Lake(record.lake_url)
        document = person_export.gather(user_id, url=url, lake=lake, artifacts_url=record.artifacts_url)
        text = person_export.to_json(document, indent=1) + "\n"
        if options.out is None:
            sys.stdout.write(text)
            return 0
        _write(options.out, text)
    except LarderError as error:
        print(f"error ({error.type}): {error}", file=sys.stderr)
        return 1
    rows = sum(len(found) for found in document["held"].values())
    print(f"written: {options.out}, {rows:,} rows from {len(document['held'])} places")
    return 0


def _write(file: Path, text: str) -> None:
    """For nobody else's eyes, whatever the umask and whatever lay there before."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise SettingsError(f"{file} cannot be written ({error.strerror}); give another OUT") from error


if __name__ == "__main__":
    sys.exit(main())
