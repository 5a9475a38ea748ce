"""A port that cannot be had is named before anything starts."""

from __future__ import annotations

import importlib
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


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("infra.serve", ("--port", "x"), "argument PORT= (--port): invalid int value: 'x'\n  make serve [PORT=8080]"),
        ("infra.ui", ("--port", "x"), "argument UI_PORT= (--port): invalid int value: 'x'\n  make ui [UI_PORT=3000]"),
        ("infra.keys", ("create", "--name", "x", "--days", "y"), "argument DAYS= (--days): invalid float value: 'y'\n  make keys"),
        ("infra.deploy", ("rollback", "--what", "x"), "argument WHAT= (--what): invalid choice: 'x'"),
        ("infra.keys", ("link", "--user", "x", "--days", "y"), "argument --days: invalid float value: 'y'"),
        ("orchestration.vacuum", ("--hours", "x"), "argument HOURS= (--hours): invalid float value: 'x'\n  make vacuum"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_read_are_told_as_make_names_them(
    module: str, arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(module).main
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
