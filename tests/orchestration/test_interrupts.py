"""Ctrl-C stops a long command wherever it arrives, and its children keep still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

START = """
import multiprocessing, signal, subprocess, sys, time
from orchestration import interrupts
interrupts.listen()
multiprocessing.get_context("spawn").Event()  # starts a process that multiprocessing unblocks signals for
child = subprocess.Popen([sys.executable, "-c", "import time; print('child', flush=True); time.sleep(60)"])

def ready():
    print("ready", flush=True)
    time.sleep(60)
"""
END = """
except KeyboardInterrupt:
    print("stopped", flush=True)
    time.sleep(0.5)  # what a child has to say about it takes a moment
    assert child.poll() is None, "the child heard of it"
    child.terminate()
    child.wait()
    sys.exit(130)
"""
PLACES = {
    "anywhere": """
try:
    ready()
""",
    "in a __del__, where Python drops it": """
class Bar:
    def __del__(self):
        ready()

try:
    bar = Bar()
    del bar
    time.sleep(60)
""",
    "between Dagster's steps, where Dagster drops it": """
from dagster._utils.interrupts import capture_interrupts
try:
    with capture_interrupts():
        print("ready", flush=True)
        while not interrupts.heard():
            time.sleep(0.01)
    interrupts.check()
    time.sleep(60)
""",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("background", [False, True])
def test_an_interrupt_of_the_whole_group_stops_the_parent_alone(place: str, background: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", START + PLACES[place] + END],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # As a shell without job control starts what goes to the background.
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if background else None,
    )
    try:
        assert process.stdout is not None
        assert {process.stdout.readline(), process.stdout.readline()} == {"ready\n", "child\n"}
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (out, err, process.returncode) == ("stopped\n", "", 130)
