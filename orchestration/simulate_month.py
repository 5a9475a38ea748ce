"""`make simulate-month`: a month of the whole loop in minutes, on a world whose truth is known, and a page that tells of it."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from infra.arguments import MakeParser
from orchestration import interrupts
from orchestration.month.plan import CALENDAR_DAYS, Plan
from schemas.errors import LarderError

console = Console()
COMMAND = "make simulate-month [DAYS=30] [SEED=7] [OUT=folder]"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = MakeParser(
        COMMAND,
        prog="make simulate-month",
        usage=COMMAND,
        description="Live through a month that begins today: train, serve, try out, drift, retrain, release and roll back, in a "
        "deployment of its own (.larder/month), which is removed and made anew. A report is left there and in OUT.",
    )
    parser.add_argument("--days", type=int, default=CALENDAR_DAYS, help="how long it is (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="another world (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a folder for a copy of the report")
    options = parser.parse_args(arguments)
    begin = time.monotonic()

    def say(line: str) -> None:
        for part in line.splitlines():
            console.print(
                f"[dim]{time.monotonic() - begin:5.0f} s[/dim]  {escape(part)}", soft_wrap=True, highlight=False
            )

    try:
        plan = Plan(datetime.now(UTC).date(), days=options.days, seed=options.seed)
        # What follows brings in torch and Dagster's libraries; a wrong argument is told of before.
        warnings.filterwarnings("ignore")
        from orchestration.month import judge, place, report, run

        here = place.fresh(plan)
        story, street = run.simulate(here, plan, say)
        fairness, segments = judge.judge_fairness(here, plan, street, story)
        explored = judge.judge_exploration(here, plan, street)
        made = report.write(
            here.folder, options.out, plan, story, fairness, segments, explored, time.monotonic() - begin
        )
    except LarderError as error:
        console.print(f"[red]error[/red] ({error.type}): {escape(str(error))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print(
            "\ninterrupted; there is no report, and the next `make simulate-month` starts afresh", soft_wrap=True
        )
        return 130
    console.print(f"  the month is told in {escape(str(made / report.MARKDOWN))}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    # Being told to stop is the same as Ctrl-C; trainings run in processes of their own, which it must not reach.
    interrupts.listen()
    sys.exit(main())
