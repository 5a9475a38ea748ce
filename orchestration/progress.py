"""One line at a time of what is going on: into the run's log, and onto the terminal when a person started the run."""

from __future__ import annotations

import logging

import dagster as dg

from orchestration import interrupts
from orchestration.compute.telling import Say

terminal = logging.getLogger("larder.progress")
"""Silent unless somebody attaches a handler, as orchestration/run.py does."""
terminal.addHandler(logging.NullHandler())
terminal.propagate = False
terminal.setLevel(logging.INFO)


def progress(context: dg.AssetExecutionContext) -> Say:
    """A function that reports one line of progress of this asset. It raises KeyboardInterrupt if one got lost."""

    def say(message: str) -> None:
        interrupts.check()
        context.log.info(message)
        terminal.info(message)

    return say
