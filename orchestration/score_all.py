"""`make score-all`: everybody's list, scored ahead. The Dagster asset of the same end is `user_scores` (orchestration/assets)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from inference.score_all import Progress
from inference.scores.batch import Sizes
from infra import deployment as deployments
from infra import postgres
from infra.arguments import MakeParser
from infra.feature_tables import ensure_view_tables
from orchestration.compute.score_all import score_everybody, told
from schemas.errors import LarderError, SettingsError

console = Console()
_EVERY = 20
"""Where no bar can be drawn, a line for every so many chunks."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = MakeParser(
        "make score-all [VERSION=…] [RESTART=1] [PER_USER=50] [CANDIDATES=200]",
        prog="make score-all",
        usage="make score-all [VERSION=…] [RESTART=1] [PER_USER=50] [CANDIDATES=200]",
        description="Score everybody with the model that serves, and keep their lists for requests that find no model. "
        "Ctrl-C keeps what was written; the next call goes on from there, unless another model serves by then, the sizes "
        "are others, or RESTART=1 says to begin anew.",
    )
    parser.add_argument("--version", help="a model that passed its gate, in place of the one that serves")
    parser.add_argument("--restart", action="store_true", help="begin with the first person")
    parser.add_argument("--per-user", type=int, default=Sizes().kept, help="items kept (default: %(default)s)")
    parser.add_argument(
        "--candidates", type=int, default=Sizes().candidates, help="items each is chosen from (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        record = deployments.current()
        if deployments.load(record.name) is None:
            raise SettingsError(f"there is no deployment in {deployments.home()}: run `make run` first")
        url = postgres.prepare(record)
        ensure_view_tables(url)
        with Bar(
            TextColumn("  scoring"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        ) as bar:  # fmt: skip
            report = score_everybody(
                url,
                record.artifacts_url,
                candidates=options.candidates,
                kept=options.per_user,
                version=options.version,
                restart=options.restart,
                say=_teller(bar),
            )
    except LarderError as error:
        console.print(f"[red]error[/red] ({error.type}): {escape(str(error))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("\ninterrupted; what was written stays, and the same command goes on from there")
        return 130
    console.print(f"  {escape(told(report))}", soft_wrap=True)
    return 0


def _teller(bar: Bar) -> Callable[[Progress], None]:
    task = bar.add_task("scoring", total=None, rate="")
    chunks = 0

    def say(progress: Progress) -> None:
        nonlocal chunks
        rate = f"{progress.per_second:,.0f}/s"
        bar.update(task, completed=progress.scored, total=max(progress.people, progress.scored), rate=rate)
        if not console.is_terminal and chunks % _EVERY == 0:
            console.print(f"  {progress.scored:,} of {progress.people:,} people, {rate}", soft_wrap=True)
        chunks += 1

    return say


if __name__ == "__main__":
    sys.exit(main())
