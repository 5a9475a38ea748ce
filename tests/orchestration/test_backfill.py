"""`make backfill`: what it refuses, what it would run, and a real backfill through a real daemon with a poisoned day."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date, timedelta
from pathlib import Path

import psycopg
import pytest
from conftest import Ingested, ingested

from orchestration.backfill import Part, plan, read_day, read_only, read_views
from orchestration.instance_api import DailyAsset, InstanceApi
from schemas.errors import SettingsError

START = date(2026, 1, 1)


def day(number: int) -> date:
    return START + timedelta(days=number)


def asset(name: str, **states: set[int]) -> DailyAsset:
    """A daily asset over 31 days; `FAILED={3}` and the like, everything else MATERIALIZED, except what `missing` names."""
    found = {day(n): "MATERIALIZED" for n in range(31) if n not in states.get("missing", set())}
    for state in ("FAILED", "MATERIALIZING"):
        found |= {day(n): state for n in states.get(state, set())}
    return DailyAsset(name, day(0), day(30), found, ("repository", "location"))


def backfill(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestration.backfill", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"LARDER_HOME": str(home)},
        check=False,
        timeout=240,
    )


def test_the_whole_range_is_one_run() -> None:
    both = [asset("events", FAILED={3}), asset("user_activity")]
    assert plan(both, day(0), day(30), None) == [Part(("events", "user_activity"), day(0), day(30))]


def test_only_takes_dagsters_states_and_never_a_gap() -> None:
    both = [asset("events", FAILED={3}), asset("user_activity", FAILED={3, 4, 9}, missing={20}, MATERIALIZING={21})]
    assert plan(both, day(0), day(30), "failed") == [
        Part(("events", "user_activity"), day(3), day(3)),
        Part(("user_activity",), day(4), day(4)),
        Part(("user_activity",), day(9), day(9)),
    ]
    assert plan(both, day(0), day(30), "missing") == [Part(("user_activity",), day(20), day(20))]
    assert plan(both, day(10), day(19), "missing") == []


@pytest.mark.parametrize(("first", "last", "words"), [(-1, 3, "FROM=2025-12-31"), (3, 31, "TO=2026-02-01")])
def test_days_outside_the_partitions_are_refused(first: int, last: int, words: str) -> None:
    with pytest.raises(SettingsError, match=f"{words} is outside the partitions of 'events': 2026-01-01 to 2026-01-31"):
        plan([asset("events")], day(first), day(last), None)


def test_views_are_built_after_the_events_and_each_once() -> None:
    assert read_views("user_activity, events,user_activity") == ["events", "user_activity"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("user_activty", "did you mean user_activity"), ("zzz", "there are: events,"), ("", "names nothing"), (None, "names nothing")],
)  # fmt: skip
def test_unknown_views_are_refused_with_what_is_near(text: str | None, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        read_views(text)


@pytest.mark.parametrize("text", ["yesterday", "2026-02-30"])
def test_what_is_not_a_day_is_refused(text: str | None) -> None:
    with pytest.raises(SettingsError, match=r"FROM=.* is not a day; write it as YYYY-MM-DD"):
        read_day("FROM", text)


@pytest.mark.parametrize("text", ["", None])
def test_a_missing_day_is_called_missing_with_the_whole_command(text: str | None) -> None:
    with pytest.raises(SettingsError, match=r"^TO= is missing; .*make backfill VIEW=a,b FROM=2026-01-01 TO=2026-01-31"):
        read_day("TO", text)


@pytest.mark.parametrize(
    ("text", "words"), [("mising", "did you mean missing"), ("x", "it is one of: missing, failed, stale")]
)
def test_an_unknown_only_is_refused_with_what_is_near(text: str, words: str) -> None:
    assert read_only("stale") == "stale"
    with pytest.raises(SettingsError, match=words):
        read_only(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--view", "events", "--from", "2026-01-02", "--to", "2026-01-01"), "ends before it starts"),
        (("--view", "events", "--from", "2026-01-01", "--to", "2026-01-02"), "start it with `make ui`"),
        (("--view", "events", "--from", "2026-01-01", "--to", "2026-01-02", "--url", "http://127.0.0.1:1"), "no Dagster instance answers"),
        (("--resume", "--url", "http://127.0.0.1:1"), "no Dagster instance answers"),
    ],
)  # fmt: skip
def test_the_command_says_what_is_wrong_and_how_to_go_on(
    larder_home: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = backfill(larder_home, *arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def ui(made: Ingested) -> Iterator[str]:
    """`make ui` of that deployment; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A session of its own: webserver, daemon and code servers are told to stop together, as Ctrl-C in a terminal does.
    process = subprocess.Popen(
        [sys.executable, "-m", "infra.ui", "--port", str(port)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{url}/server_info", timeout=2):
                    break
            except OSError:
                assert process.poll() is None, "`make ui` ended by itself"
                assert time.monotonic() < end, "`make ui` does not answer"
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        finally:
            # What does not listen must not outlive the test.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def stored(url: str, view: str) -> dict[date, int]:
    with psycopg.connect(url) as connection:
        return dict(connection.execute(f"SELECT partition_date, count(*) FROM features.{view} GROUP BY 1").fetchall())


def summary(output: str) -> dict[str, tuple[int, ...]]:
    """The counts of the command's last table: materialised, failed."""
    lines = [line.split() for line in output.splitlines() if " materialised " in line]
    return {name: tuple(int(cell.replace(",", "")) for cell in cells if cell[0].isdigit()) for name, *cells in lines}


def test_one_poisoned_day_fails_alone_and_only_failed_repairs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ingested(tmp_path / "home", monkeypatch, 8)
    bad = made.first + timedelta(days=5)
    wanted = ("--view", "user_activity,events", "--from", f"{made.first}", "--to", f"{made.last}")
    with ui(made):
        dry = backfill(tmp_path / "home", *wanted, "--only", "missing", "--dry-run")
        assert dry.stdout == f"run 1 of 1: events, user_activity: {made.first} to {made.last} (16 partitions)\n", (
            dry.stderr
        )
        outside = backfill(tmp_path / "home", "--view", "events", "--from", "2020-01-01", "--to", f"{made.last}")
        assert (outside.returncode, "outside the partitions" in outside.stderr) == (1, True)

        with made.truncated(bad):
            poisoned = backfill(tmp_path / "home", *wanted)
        assert poisoned.returncode == 1, poisoned.stdout + poisoned.stderr
        assert summary(poisoned.stdout) == {"events": (7, 1), "user_activity": (5, 3)}
        assert f"failed: events: {bad}\n" in poisoned.stdout
        assert f"failed: user_activity: {bad} to {made.last}\n" in poisoned.stdout
        before = stored(made.url, "user_activity")
        assert sorted(before) == [made.first + timedelta(days=offset) for offset in range(5)]

        repaired = backfill(tmp_path / "home", *wanted, "--only", "failed")
        assert repaired.returncode == 0, repaired.stdout + repaired.stderr
        assert summary(repaired.stdout) == {"events": (1, 0), "user_activity": (3, 0)}
        after = stored(made.url, "user_activity")
        assert len(after) == 8
        assert {one: rows for one, rows in after.items() if one in before} == before
        assert (
            backfill(tmp_path / "home", *wanted, "--only", "failed").stdout == "nothing to do: no partition is failed\n"
        )
        cancel_while_starting(made, tmp_path / "home", wanted)
    assert "start it with `make ui`" in backfill(tmp_path / "home", "--resume").stderr


def cancel_while_starting(made: Ingested, home: Path, wanted: tuple[str, ...]) -> None:
    """A backfill that is stopped before it runs, when Dagster may refuse to: it is stopped all the same."""
    before = stored(made.url, "user_activity")
    with psycopg.connect(made.url) as connection:
        built_at = connection.execute("SELECT max(built_at) FROM feature_ledger").fetchone()
    command = [sys.executable, "-m", "orchestration.backfill", *wanted]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        with psycopg.connect(made.url) as lock:
            lock.execute(
                "SELECT pg_advisory_xact_lock(hashtext('features.user_activity'))"
            )  # else it may be done by then
            said = ""
            for line in watching.stdout:
                said += line
                if line.endswith((" · starting\n", " · not_started\n")):
                    break
            stopped = backfill(home, "--cancel")
        said += watching.stdout.read()
    assert watching.returncode == 1, said
    # Between the line that was read and the request the run may have begun, and be told as any other is.
    told = ("is told to stop as soon as it can be", "run 1 · told to stop\n")
    assert any(words in stopped.stdout for words in told), stopped.stdout + stopped.stderr
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "run 1 · canceled\n" in stopped.stdout
    assert f"not run: user_activity: {made.first} to {made.last}\n" in stopped.stdout
    assert "what is materialised stays" in stopped.stdout
    with psycopg.connect(made.url) as connection:
        assert connection.execute("SELECT max(built_at) FROM feature_ledger").fetchone() == built_at
    assert stored(made.url, "user_activity") == before
    assert "has ended already" in backfill(home, "--cancel").stdout


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_over_a_long_range_only_the_windows_that_hold_the_poisoned_day_are_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ingested(tmp_path / "home", monkeypatch, 190, events_per_person=60)
    bad = made.first + timedelta(days=2)
    wanted = ("--view", "events,user_activity,item_activity", "--from", f"{made.first}", "--to", f"{made.last}")
    with ui(made):
        with made.truncated(bad):
            poisoned = backfill(tmp_path / "home", *wanted)
        assert poisoned.returncode == 1
        # The longest window is 180 days: it holds the bad day from that day on until 179 days later.
        assert summary(poisoned.stdout) == {"events": (189, 1), "user_activity": (10, 180), "item_activity": (10, 180)}
        before = stored(made.url, "user_activity")
        assert set(before) == {made.first + timedelta(days=offset) for offset in (0, 1, *range(182, 190))}
        repaired = backfill(tmp_path / "home", *wanted, "--only", "failed")
        assert repaired.returncode == 0, repaired.stdout + repaired.stderr
        assert summary(repaired.stdout) == {"events": (1, 0), "user_activity": (180, 0), "item_activity": (180, 0)}
    after = stored(made.url, "user_activity")
    assert len(after) == 190
    assert {one: rows for one, rows in after.items() if one in before} == before


@pytest.mark.prove
@pytest.mark.timeout(600)
def test_a_run_that_is_killed_keeps_its_finished_chunks_and_they_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ingested(tmp_path / "home", monkeypatch, 40)
    wanted = ["--view", "user_activity,item_activity", "--from", f"{made.first}", "--to", f"{made.last}"]
    with ui(made) as url, psycopg.connect(made.url) as lock:
        lock.execute("SELECT pg_advisory_xact_lock(hashtext('features.item_activity'))")  # the second view waits here
        command, said = [sys.executable, "-m", "orchestration.backfill", *wanted], ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            for line in watching.stdout:
                said += line
                if line.startswith("  user_activity, "):
                    os.kill(process_of(url, said.split("/runs/")[1].split()[0]), signal.SIGKILL)
                    lock.rollback()
        assert watching.returncode == 1, said
        assert len(stored(made.url, "user_activity")) == 30
        first_chunk = f"{made.first} to {made.first + timedelta(days=29)}"
        end = time.monotonic() + 120
        while True:
            todo = backfill(tmp_path / "home", *wanted, "--only", "failed", "--dry-run").stdout
            if f": item_activity: {first_chunk} (30 partitions)" in todo:
                break
            assert time.monotonic() < end, f"what the killed run had written is not reported: {todo}"
            time.sleep(2)
        repaired = backfill(tmp_path / "home", *wanted, "--only", "failed")
        assert repaired.returncode == 0, repaired.stdout + repaired.stderr
        assert summary(repaired.stdout) == {"user_activity": (10, 0), "item_activity": (40, 0)}


def process_of(url: str, run_id: str) -> int:
    """The process that executes a run, as its own log names it."""
    query = "query ($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events { ... on MessageEvent { message } } } } }"
    events = InstanceApi(url).call(query, id=run_id)["logsForRun"]["events"]
    (found,) = {match[1] for event in events if (match := re.search(r"in process \(pid: (\d+)\)", event["message"]))}
    return int(found)
