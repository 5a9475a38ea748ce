"""A port that cannot be had is named before anything starts."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("module", "way_out"), [("infra.serve", "make serve PORT=…"), ("infra.ui", "make ui UI_PORT=…")]
)
def test_a_taken_port_is_named_with_the_way_out(larder_home: Path, module: str, way_out: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", module, "--port", str(port)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert way_out in done.stderr
    assert not larder_home.exists()


def test_a_number_that_is_no_port_is_refused(larder_home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "infra.serve", "--port", "70000"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "a port is 0 to 65535" in done.stderr
