"""Ctrl-C for a long command: heard by this process and by none of its children, and never lost.

A terminal sends SIGINT to the whole group. Children that hear it print tracebacks of their own or end before their
parent has decided anything, so it is blocked here, which they inherit, and a thread turns it into SIGTERM for this
process alone. What SIGTERM raises can still get lost: Python drops what is raised in a `__del__` or a callback, and
Dagster drops what arrives between two steps. So it is raised again, and `check` raises for whoever asks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing import resource_tracker

_AGAIN_AFTER_SECONDS = 0.2
_read_end: int | None = None
_heard = threading.Event()


def listen() -> None:
    """From now on SIGINT and SIGTERM raise KeyboardInterrupt in this, the main thread, until one of them got through."""
    global _read_end
    # Set even where they are ignored, as a shell has it for what runs in the background: nothing would end the run but
    # kill -9, which leaves half-made files.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    _read_end, write_end = os.pipe()
    for end in (_read_end, write_end):
        os.set_blocking(end, False)
    # Told of every signal, whichever handler Dagster has put in the place of ours.
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    # It unblocks SIGINT as it starts, which it would otherwise do in the middle of the run.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=_relay, daemon=True, name="interrupts").start()
    sys.unraisablehook = _raise_again


def heard() -> bool:
    """True if this process was told to stop since `listen`."""
    if _read_end is not None and not _heard.is_set():
        try:
            if {signal.SIGINT, signal.SIGTERM} & set(os.read(_read_end, 1024)):
                _heard.set()
        except BlockingIOError:
            pass
    return _heard.is_set()


def check() -> None:
    """Raise KeyboardInterrupt if this process was told to stop and goes on nevertheless."""
    if heard():
        raise KeyboardInterrupt


def _relay() -> None:
    while True:
        signal.sigwait({signal.SIGINT})
        _stop_main_thread()


def _stop_main_thread() -> None:
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, signal.SIGTERM)


def _raise_again(lost: sys.UnraisableHookArgs) -> None:
    if issubclass(lost.exc_type, Exception):
        sys.__unraisablehook__(lost)
        return
    # Not at once: this very hook may drop exceptions too.
    again = threading.Timer(_AGAIN_AFTER_SECONDS, _stop_main_thread)
    again.daemon = True
    again.start()
