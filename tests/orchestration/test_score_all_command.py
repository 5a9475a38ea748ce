"""`make score-all` and the asset of the same end: what they say, what they write, and how Ctrl-C and errors end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dagster as dg
import psycopg
import pytest
from conftest import days_ago
from released import PEOPLE, Released, released

from inference.score_all import Report
from infra.deployment import Deployment
from orchestration import score_all as command
from orchestration.compute.score_all import told
from orchestration.definitions import build_definitions
from orchestration.resources import Larder


@pytest.fixture
def world(
    postgres_url: str, template: str, tmp_path: Path, larder_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Released]:
    """A deployment `small` that serves."""
    with released(postgres_url, template, tmp_path / "released") as made:
        monkeypatch.setenv("DATABASE_URL", made.url)
        monkeypatch.setenv("ARTIFACTS_URL", made.artifacts_url)
        Deployment("small", None, days_ago(30).date()).save()
        with psycopg.connect(made.url) as connection:
            connection.execute("INSERT INTO deployment (name) VALUES ('small') ON CONFLICT DO NOTHING")
        monkeypatch.setattr(command.console, "width", 300)
        yield made


def lists(world: Released) -> dict[str, tuple[int, str, int]]:
    with psycopg.connect(world.url) as connection:
        rows = connection.execute("SELECT user_id, run_id, model_version, cardinality(item_ids) FROM user_scores")
        return {row[0]: row[1:] for row in rows}


def test_everybody_is_scored_and_the_outcome_told(world: Released, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--per-user", "7", "--candidates", "20"]) == 0
    shown = capsys.readouterr().out
    assert f"{len(PEOPLE)} people scored by model {world.versions[0]}" in shown
    assert lists(world) == dict.fromkeys(PEOPLE, (1, world.versions[0], 7))
    assert command.main(["--version", world.versions[1]]) == 0
    assert {row[1] for row in lists(world).values()} == {world.versions[1]}


def test_ctrl_c_keeps_what_was_written_and_says_how_to_go_on(
    world: Released, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "score_everybody", interrupted)
    assert command.main([]) == 130
    assert "the same command goes on from there" in capsys.readouterr().out


def test_what_is_wrong_is_one_line(
    world: Released, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with psycopg.connect(world.url) as connection:
        connection.execute("DELETE FROM model_aliases")
    assert command.main([]) == 1
    assert "error (scores): no model is released yet" in capsys.readouterr().out
    assert command.main(["--candidates", "5"]) == 1
    assert "CANDIDATES is 5; give a whole number from 10 to 1000" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        command.main(["--per-user", "many"])
    assert stopped.value.code == 2
    assert "PER_USER=" in capsys.readouterr().err
    monkeypatch.setenv("LARDER_HOME", str(tmp_path / "elsewhere"))
    assert command.main([]) == 1
    assert "run `make run` first" in capsys.readouterr().out


def test_the_asset_writes_the_lists_and_says_how_fast(world: Released) -> None:
    job = build_definitions(Larder(deployment="small")).resolve_implicit_global_asset_job_def()

    def materialise(instance: dg.DagsterInstance) -> dict[str, dg.MetadataValue]:
        config = {"ops": {"user_scores": {"config": {"per_user": 9, "candidates": 30}}}}
        result = job.execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey("user_scores")], run_config=config
        )
        [event] = result.get_asset_materialization_events()
        return dict(event.materialization.metadata)

    with dg.DagsterInstance.ephemeral() as instance:
        found = materialise(instance)
        assert found["rows"].value == len(PEOPLE)
        assert found["model_version"].value == world.versions[0]
        assert {row[2] for row in lists(world).values()} == {9}
        with psycopg.connect(world.url) as connection:
            connection.execute("DELETE FROM model_aliases")
        assert materialise(instance)["rows"].value == 0


def test_the_outcome_tells_what_was_left_out() -> None:
    report = Report("v", True, 10, scored=90, refused=2, gone=1, seconds=9.0, featureless=90, provider="CPUExecutionProvider", precision="int8")  # fmt: skip
    words = told(report)
    assert "90 people scored by model v in 9.0 s, 10 a second (int8 on CPU)" in words
    assert "10 had been before it was stopped" in words
    assert "2 left out" in words
    assert "1 lists dropped" in words
    assert "90 scored without features" in words
    assert told(replace(report, resumed=False, refused=0, gone=0, featureless=0)).count(";") == 0
