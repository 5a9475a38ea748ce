"""`make forget`: erase a person from the current deployment. The Dagster job of the same end is in orchestration/erasure.py."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infra import deployment as deployments
from infra import postgres
from infra.arguments import MakeParser, person_id
from infra.deployment import Deployment
from infra.feature_tables import ensure_view_tables
from orchestration.compute import forget as erasure
from orchestration.compute.forget import Receipt
from orchestration.compute.lake import Lake
from schemas.errors import LarderError, SettingsError, UnknownPerson

console = Console(highlight=False)

EXPLANATION = """\
Erases everything held of one person: events in the lake (files are rewritten), snapshots, recent events, history,
profile, quarantined rows that name them, training sets. Their events up to now do not come back with a later load; what
they do afterwards is a new beginning. A trained model keeps what it learned until it is trained again: see the README.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = MakeParser(
        "make forget USER_ID=… [YES=1] [REQUEST=1], or make forget RESUME=1",
        variables={"user": "USER_ID"},
        prog="python -m orchestration.forget",
        description=EXPLANATION,
        epilog="If it is interrupted, run it again: it finishes what was begun.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--user",
        metavar="ID",
        help="whom to forget; - reads the id from standard input, where no list of processes shows it",
    )
    what.add_argument(
        "--resume", action="store_true", help="only finish what an interrupted erasure left, and what was requested"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--request",
        action="store_true",
        help="only store the request and print its id, for the Dagster job forget_person; the person reads as unknown at once",
    )
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    try:
        record = deployments.current()
        if deployments.load(record.name) is None:
            raise SettingsError(f"there is nothing to forget in {deployments.home()}: run `make run` first")
        return _resume(record) if options.resume else _forget(record, person_id(options.user), options)
    except LarderError as error:
        console.print(f"[red]error[/red] ({error.type}): {escape(str(error))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("\ninterrupted; run it again to finish what was begun")
        return 130


def _database(record: Deployment) -> str:
    url = postgres.prepare(record)
    ensure_view_tables(url)
    return url


def _forget(record: Deployment, user_id: str, options: argparse.Namespace) -> int:
    url, lake = _database(record), Lake(record.lake_url)
    if finished := erasure.finish(url=url, lake=lake, artifacts_url=record.artifacts_url):
        console.print(f"finished {finished} interrupted erasure{'s' if finished > 1 else ''}")
    held = erasure.holdings(url, lake, user_id)
    if held:
        console.print(f"held of this person in deployment {record.name}", soft_wrap=True)
        table = Table()
        table.add_column("where")
        table.add_column("rows", justify="right")
        for place, rows in held.items():
            table.add_row(place, f"{rows:,}")
        console.print(table)
        # A request erases nothing yet: there is nothing to be agreed to for good.
        if not options.yes and not options.request and not _agreed():
            console.print("nothing was changed")
            return 2
    try:
        if options.request:
            console.print(f"request {erasure.request_erasure(url, lake, user_id)}")
            # Beside what a script reads.
            print(
                "the person reads as unknown from now on; the Dagster job forget_person erases them with this id, "
                "or `make forget RESUME=1`",
                file=sys.stderr,
            )
            return 0
        receipt = erasure.forget(user_id, url=url, lake=lake, artifacts_url=record.artifacts_url)
    except UnknownPerson as error:
        if error.forgotten_at is None:
            raise
        console.print(escape(str(error)), soft_wrap=True)
        return 0
    _show(receipt)
    return 0


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise SettingsError("this erases for good and nobody is there to be asked; add --yes (with make: YES=1)")
    return console.input("Erase all of it, for good? [y/N] ").strip().lower() in ("y", "yes")


def _resume(record: Deployment) -> int:
    url, lake = _database(record), Lake(record.lake_url)
    finished = erasure.finish(url=url, lake=lake, artifacts_url=record.artifacts_url)
    requests = erasure.open_requests(url)
    for request_id in requests:
        _show(erasure.fulfil(request_id, url=url, lake=lake, artifacts_url=record.artifacts_url))
    console.print(f"{finished} interrupted erasures finished, {len(requests)} requests fulfilled")
    return 0


def _show(receipt: Receipt) -> None:
    console.print(f"receipt {receipt.receipt_id}", soft_wrap=True)
    table = Table()
    table.add_column("removed from")
    table.add_column("rows", justify="right")
    for place, rows in sorted(receipt.removed.items()):
        table.add_row(place, f"{rows:,}")
    console.print(table)
    console.print(f"events up to {receipt.forgotten_at:%Y-%m-%d %H:%M:%S} UTC stay out", soft_wrap=True)
    if receipt.stale:
        stale = ", ".join(f"{view} {partitions:,}" for view, partitions in receipt.stale.items())
        console.print(f"partitions to rebuild (`make run` does): {stale}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
