"""Forgetting as people do it: the command with its questions and errors, and the job, of which Dagster keeps no id."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import dagster as dg
import psycopg
import pytest
from conftest import TODAY, days_ago
from worlds import ListSource

from infra.deployment import Deployment
from infra.feature_tables import ensure_view_tables
from infra.ui import prepare_dagster
from orchestration import forget as command
from orchestration.checks import counts_add_up, settled_check
from orchestration.compute.forget import holdings, request_erasure
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from orchestration.definitions import build_definitions
from orchestration.due import what_is_due
from orchestration.erasure import erase_who_asked
from orchestration.resources import Larder
from schemas.events import Event, Item, Person
from schemas.views import ITEM_ACTIVITY, VIEWS

ANNA = "anna@example.org"


@pytest.fixture
def record(larder_home: Path, monkeypatch: pytest.MonkeyPatch, database: str) -> Deployment:
    """A deployment with two people."""
    monkeypatch.setenv("DATABASE_URL", database)
    monkeypatch.setattr("orchestration.forget.console.width", 200)
    made = Deployment("small", None, days_ago(30).date())
    made.save()
    events = [
        Event(f"e{n}", ANNA if n % 2 else "bo", "i", "view", None, days_ago(3 + n % 5) - timedelta(minutes=n))
        for n in range(20)
    ]
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        ingest(
            ListSource(events, [Item("i", "An item")], [Person(ANNA, {})]), Lake(made.lake_url), connection, now=TODAY
        )
    return made


def test_help_says_what_goes_and_what_stays(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "A trained model keeps what it learned until it is trained again" in shown
    assert "run it again" in shown


def test_an_unknown_person_an_unusable_id_and_no_deployment_are_errors(
    record: Deployment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert command.main(["--user", "nobody", "--yes"]) == 1
    assert "error (unknown_person): nothing is held of a person 'nobody'" in capsys.readouterr().out
    assert command.main(["--user", "nobody", "--request"]) == 1
    assert command.main(["--user", ""]) == 1
    assert "user_id is empty" in capsys.readouterr().out
    monkeypatch.setenv("LARDER_HOME", str(tmp_path / "elsewhere"))
    assert command.main(["--user", ANNA, "--yes"]) == 1
    assert "run `make run` first" in capsys.readouterr().out


def test_nothing_goes_unless_somebody_agrees(
    record: Deployment, database: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = Lake(record.lake_url)
    before = holdings(database, lake, ANNA)
    assert command.main(["--user", ANNA]) == 1  # nobody is there to be asked
    assert "add --yes" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(command.console, "input", lambda _: "n")
    assert command.main(["--user", ANNA]) == 2
    shown = capsys.readouterr().out
    assert "events in the lake" in shown
    assert "nothing was changed" in shown
    assert holdings(database, lake, ANNA) == before


def test_a_request_needs_nobody_to_agree_and_says_what_it_does(
    record: Deployment, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--user", ANNA, "--request"]) == 0
    shown = capsys.readouterr()
    with psycopg.connect(database) as connection:
        (request_id,) = connection.execute("SELECT request_id FROM erasure_requests").fetchone() or ("",)
    assert shown.out.splitlines()[-1] == f"request {request_id}"  # what a script reads
    assert "the person reads as unknown from now on" in shown.err
    assert holdings(database, Lake(record.lake_url), ANNA)["events in the lake"] == 10


def test_forgetting_prints_a_receipt_and_a_repeat_says_when(
    record: Deployment, database: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ANNA}\n"))
    assert command.main(["--user", "-", "--yes"]) == 0
    shown = capsys.readouterr().out
    assert "receipt" in shown
    assert "public.user_history" in shown
    assert holdings(database, Lake(record.lake_url), ANNA) == {}
    assert command.main(["--user", ANNA, "--yes"]) == 0
    assert "they were forgotten on" in capsys.readouterr().out


@pytest.fixture
def instance(record: Deployment, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    """The deployment's own Dagster instance, with everything it stores on disk."""
    monkeypatch.setenv("DAGSTER_HOME", "")
    prepare_dagster(record)
    with dg.DagsterInstance.get() as opened:
        yield opened


def test_the_job_forgets_by_a_request_and_dagster_stores_no_id(
    record: Deployment, instance: dg.DagsterInstance, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--user", ANNA, "--request", "--yes"]) == 0
    request_id = capsys.readouterr().out.strip().rsplit("request ", 1)[1]
    job = build_definitions(Larder(deployment=record.name)).resolve_job_def("forget_person")
    config = {"ops": {"erase_people": {"config": {"request_id": request_id}}}}
    assert job.execute_in_process(instance=instance, run_config=config).success
    assert holdings(database, Lake(record.lake_url), ANNA) == {}
    # Without an id: every request that waits.
    request_erasure(database, Lake(record.lake_url), "bo")
    result = job.execute_in_process(instance=instance)
    assert result.success
    assert holdings(database, Lake(record.lake_url), "bo") == {}
    failed = job.execute_in_process(
        instance=instance,
        run_config={"ops": {"erase_people": {"config": {"request_id": "no-such"}}}},
        raise_on_error=False,
    )
    assert not failed.success
    files = [file for file in record.folder.rglob("*") if file.is_file()]
    assert any(file.suffix == ".db" for file in files)
    assert any(request_id.encode() in file.read_bytes() for file in files)  # the search finds what is stored
    assert [str(file) for file in files if ANNA.encode() in file.read_bytes()] == []


def test_the_sensor_starts_the_job_for_each_request_and_names_nobody(
    record: Deployment, instance: dg.DagsterInstance, database: str
) -> None:
    larder = Larder(deployment=record.name)
    definitions = build_definitions(larder)

    def look() -> dg.SensorResult | dg.SkipReason:
        found = erase_who_asked(dg.build_sensor_context(instance=instance, resources={"larder": larder}))
        assert isinstance(found, dg.SensorResult | dg.SkipReason)
        return found

    assert isinstance(look(), dg.SkipReason)
    requests = {request_erasure(database, Lake(record.lake_url), person) for person in (ANNA, "bo")}
    found, again = look(), look()
    assert isinstance(found, dg.SensorResult)
    assert isinstance(again, dg.SensorResult)
    runs = found.run_requests or []
    # Dagster starts a run once for each key.
    assert [run.run_key for run in runs] == [run.run_key for run in again.run_requests or []]
    assert {run.run_config["ops"]["erase_people"]["config"]["request_id"] for run in runs} == requests
    assert ANNA not in repr(runs)
    job = definitions.resolve_job_def("forget_person")
    assert job.execute_in_process(instance=instance, run_config=runs[0].run_config).success
    left = look()
    assert isinstance(left, dg.SensorResult)
    assert [run.run_key for run in left.run_requests or []] == [runs[1].run_key]


def test_a_driver_that_quotes_the_row_is_not_quoted_by_dagster(
    record: Deployment, instance: dg.DagsterInstance, database: str
) -> None:
    """A table that refers to people and refuses to let them go: Postgres's message names the key."""
    with psycopg.connect(database) as connection:
        connection.execute("CREATE TABLE letters (letter_id int, addressee text REFERENCES people (user_id))")
        connection.execute("INSERT INTO letters VALUES (1, %s)", (ANNA,))
    request_id = request_erasure(database, Lake(record.lake_url), ANNA)
    job = build_definitions(Larder(deployment=record.name)).resolve_job_def("forget_person")
    failed = job.execute_in_process(instance=instance, raise_on_error=False)
    assert not failed.success
    stored = b"".join(file.read_bytes() for file in record.dagster_home.rglob("*") if file.is_file())
    assert f"erasure request {request_id} failed with ForeignKeyViolation".encode() in stored
    assert ANNA.encode() not in stored
    with psycopg.connect(database) as connection:
        connection.execute("DROP TABLE letters")
    assert command.main(["--resume"]) == 0
    assert holdings(database, Lake(record.lake_url), ANNA) == {}


def test_the_next_run_rebuilds_what_counted_the_person_and_every_check_holds(record: Deployment, database: str) -> None:
    larder = Larder(deployment=record.name)
    ensure_view_tables(database)
    yesterday = days_ago(1).date()
    for view in VIEWS:
        materialise(view, record.start_date, yesterday, url=database, lake=larder.lake)
    assert what_is_due(larder, False).parts == []
    assert command.main(["--user", ANNA, "--yes"]) == 0
    first = min(day for day, _ in larder.lake.days(larder.connect()))
    # The person's own rows are gone already. What requests read is repaired first, whatever else waits.
    served = yesterday - timedelta(days=2)
    assert what_is_due(larder, False).parts == [
        (("item_activity",), served, yesterday),
        (("item_activity",), first, served - timedelta(days=1)),
    ]
    for check in (counts_add_up, *(settled_check(view) for view in VIEWS)):
        assert check(larder=larder).passed
    materialise(ITEM_ACTIVITY, first, yesterday, url=database, lake=larder.lake)
    assert what_is_due(larder, False).parts == []
    for check in (counts_add_up, *(settled_check(view) for view in VIEWS)):
        assert check(larder=larder).passed
