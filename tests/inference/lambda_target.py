"""What the tests' Lambda runtime runs: the real handler around the small application."""

from __future__ import annotations

import threading
import time

from door_app import SmallApplication

from inference.handlers.aws_lambda import create_handler
from inference.routes import Application

attempts = 0


def _flaky() -> Application:
    global attempts
    attempts += 1
    if attempts == 1:
        raise RuntimeError("CANARY: no model yet")
    return SmallApplication()


class _Early(SmallApplication):
    """Takes its time to be built."""

    def __init__(self) -> None:
        super().__init__()
        time.sleep(0.2)


def _early() -> Application:
    """Fails at the start and not after."""
    if threading.current_thread().name == "larder-start":
        raise RuntimeError("CANARY: no database yet")
    return SmallApplication()


handler = create_handler(SmallApplication)
flaky_handler = create_handler(_flaky)
early_handler = create_handler(_Early, at_start=True)
early_flaky_handler = create_handler(_early, at_start=True)
