"""`make run` with unusable input: a clear error, a status other than zero, nothing half made."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from orchestration.run import main


def run(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "DEPLOYMENT")}
    return subprocess.run(
        [sys.executable, "-m", "orchestration.run", *arguments],
        capture_output=True,
        text=True,
        env=variables | {"LARDER_HOME": str(home), "COLUMNS": "400"} | environment,
        check=False,
    )


def folder(tmp_path: Path, **files: str) -> Path:
    made = tmp_path / "data"
    made.mkdir()
    for name, text in files.items():
        (made / name.replace("__", ".")).write_text(text)
    return made


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "data"),
        ({}, "empty"),
        ({"notes__txt": "hello"}, "unknown layout"),
        ({"sequences__txt": "1\t2 3 4\n"}, "no timestamps"),
        ({"ratings__csv": "who,what\n1,2\n", "movies__csv": "movieId,title,genres\n"}, "ratings.csv"),
    ],
)
def test_data_that_cannot_be_read_is_refused(tmp_path: Path, files: dict[str, str] | None, words: str) -> None:
    data = tmp_path / "data" if files is None else folder(tmp_path, **files)
    done = run(tmp_path / "home", "--data", str(data))
    assert done.returncode == 1
    assert "error (source)" in done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (("--data", "ftp://x/y"), {}, "DATA is 'ftp://x/y'; give a folder or s3://bucket/prefix"),
        ((), {"LAKE_URL": "ftp://x"}, "LAKE_URL 'ftp://x' cannot be used: a lake lies under file:// or s3://"),
        ((), {"LARDER_ENGINE": "sparc"}, "LARDER_ENGINE is 'sparc'; give duckdb or spark"),
        ((), {"DEPLOYMENT": "../x"}, "DEPLOYMENT is '../x'; give letters"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_made(
    tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], words: str
) -> None:
    done = run(tmp_path / "home", *arguments, **environment)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "home").exists()


def test_an_unreachable_database_is_named(tmp_path: Path) -> None:
    done = run(tmp_path / "home", DATABASE_URL="postgresql://me:secret@127.0.0.1:1/x")
    assert done.returncode == 1
    assert "cannot reach the database postgresql://me:***@127.0.0.1:1/x" in done.stderr
    assert "secret" not in done.stdout + done.stderr


def test_a_database_that_is_no_postgres_is_refused_by_its_url(tmp_path: Path) -> None:
    done = run(tmp_path / "home", DATABASE_URL="mysql://me:secret@x/y")
    assert done.returncode == 1
    assert "DATABASE_URL is 'mysql://me:***@x/y', and a postgresql:// URL is needed" in done.stderr
    assert "secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "deployment", "command"),
    [
        ((), None, "make run"),
        (("--data", "/a b/ml", "--user", "u1", "--retrain"), None, "make run DATA='/a b/ml' USER_ID=u1 RETRAIN=1"),
        (("--data", "simulated?people=9&seed=3"), "x", "DEPLOYMENT=x make run DATA='simulated?people=9&seed=3'"),
    ],
)
def test_an_interrupt_names_the_command_that_goes_on(
    arguments: tuple[str, ...],
    deployment: str | None,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(_: object) -> int:
        os.environ["DEPLOYMENT"] = "settled"  # as preparing Dagster does
        raise KeyboardInterrupt

    monkeypatch.setenv("DEPLOYMENT", deployment or "")
    monkeypatch.setattr("orchestration.run._run", interrupted)
    monkeypatch.setattr("orchestration.run.console", Console(soft_wrap=True))
    with warnings.catch_warnings():
        assert main(arguments) == 130
    assert capsys.readouterr().out.strip() == f"interrupted; what was finished is kept, `{command}` goes on from there"


def test_help_says_what_it_does(tmp_path: Path) -> None:
    done = run(tmp_path / "home", "--help")
    assert done.returncode == 0
    assert "Safe to repeat" in done.stdout
