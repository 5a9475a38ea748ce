"""What the tests' Lambda runtime runs: the real handler around the small application."""

from __future__ import annotations

from door_app import SmallApplication

from inference.handlers.aws_lambda import create_handler
from inference.http import Application

attempts = 0


def _flaky() -> Application:
    global attempts
    attempts += 1
    if attempts == 1:
        raise RuntimeError("CANARY: no model yet")
    return SmallApplication()


handler = create_handler(SmallApplication)
flaky_handler = create_handler(_flaky)
