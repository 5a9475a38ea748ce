"""The commands and Dagster jobs around people: exports that wait are made, what is old is ended, and nothing names anybody."""

from __future__ import annotations

import io
import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest
from conftest import TODAY, days_ago
from worlds import ListSource

from infra.deployment import Deployment
from orchestration import export_person
from orchestration.compute import person_export
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.people import export_person as export_job
from orchestration.people import export_who_asked, retention
from orchestration.resources import Larder
from schemas.events import Event, Item, Person

ANNA = "anna.unmistakable@example.org"


@pytest.fixture
def record(larder_home: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    monkeypatch.setenv("DATABASE_URL", database)
    made = Deployment("small", None, (TODAY - timedelta(days=30)).date())
    made.save()
    events: list[Any] = [Event(f"e{n}", ANNA, "i", "view", None, days_ago(n)) for n in range(1, 6)]
    source = ListSource(events, [Item("i", "I")], [Person(ANNA, {"town": "X"})])
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        ingest(source, Lake(made.lake_url), connection, now=TODAY)
    return made


def test_the_command_writes_a_file_for_its_owner_alone(
    record: Deployment, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "anna.json"
    assert export_person.main(["--user", ANNA, "--out", str(out)]) == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert len(json.loads(out.read_text())["held"][person_export.LAKE]) == 5
    said = capsys.readouterr().out
    assert "rows from" in said
    assert ANNA not in said
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ANNA}\n"))
    assert export_person.main(["--user", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["user_id"] == ANNA
    assert export_person.main(["--user", "nobody"]) == 1
    assert "nothing is held of a person 'nobody'" in capsys.readouterr().err
    assert export_person.main(["--user", "", "--out", str(out)]) == 1


def test_a_request_is_seen_by_the_sensor_and_made_by_the_job(
    record: Deployment, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export_person.main(["--user", ANNA, "--request"]) == 0
    receipt = capsys.readouterr().out.strip()
    instance = dg.DagsterInstance.ephemeral()
    context = dg.build_sensor_context(instance=instance)
    larder = Larder()
    made = export_who_asked(context, larder=larder)
    (request,) = made.run_requests
    assert ANNA not in str(request)
    result = export_job.execute_in_process(
        run_config=request.run_config, resources={"larder": larder}, instance=instance
    )
    assert result.success
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT request_id, document->>'user_id' FROM exports").fetchall()
    assert rows == [(receipt, ANNA)]
    assert isinstance(export_who_asked(context, larder=larder), dg.SkipReason)
    logged = "\n".join(str(entry) for entry in instance.all_logs(result.run_id))
    assert receipt in logged
    assert ANNA not in logged


def test_an_export_that_fails_names_the_request_and_not_the_person(record: Deployment, database: str) -> None:
    with psycopg.connect(database) as connection:
        connection.execute("INSERT INTO exports (request_id, user_id) VALUES ('r', 'nobody.at.all')")
    instance = dg.DagsterInstance.ephemeral()
    result = export_job.execute_in_process(resources={"larder": Larder()}, instance=instance, raise_on_error=False)
    assert not result.success
    logged = "\n".join(str(entry) for entry in instance.all_logs(result.run_id))
    assert "export request r names somebody of whom nothing is held" in logged
    assert "nobody.at.all" not in logged


def test_retention_deletes_and_leaves_a_report(record: Deployment, database: str) -> None:
    with psycopg.connect(database) as connection:
        connection.execute(
            "INSERT INTO exports (request_id, user_id, requested_at) VALUES ('r', 'x', %s)",
            (datetime.now(UTC) - timedelta(days=8),),
        )
    report = record.folder / "reports" / "retention" / "latest.json"
    for dry_run, left in ((True, 1), (False, 0)):
        config = {"ops": {"end_what_is_old": {"config": {"dry_run": dry_run}}}}
        assert retention.execute_in_process(run_config=config, resources={"larder": Larder()}).success
        assert report.exists() == (not dry_run)
        with psycopg.connect(database) as connection:
            assert connection.execute("SELECT count(*) FROM exports").fetchone() == (left,)
    told = {table["table"]: table for table in json.loads(report.read_text())["tables"]}
    assert (told["public.exports"]["rows"], told["public.exports"]["days"]) == (1, 7)
    assert told["public.exports"]["why"]
