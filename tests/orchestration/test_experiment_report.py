"""The report through Dagster: what its page says, and what a broken guardrail sets in motion."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import dagster as dg
import psycopg
import pytest
from conftest import TODAY, Ingested, ingested
from experiment_log import Trial
from released import write_release

from infra import registry
from orchestration.definitions import build_definitions
from orchestration.resources import Larder
from schemas.manifest import CHAMPION_POINTER, MANIFEST_FILE, Manifest

START = TODAY - timedelta(days=6)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ingested:
    monkeypatch.delenv("LARDER_EXPERIMENTS", raising=False)
    return ingested(tmp_path / "home", monkeypatch, 10)


def declare(small: Ingested, more: str = "", new: str = "") -> None:
    (small.record.folder / "experiments.toml").write_text(
        f"[experiments.trial]\nstart = {START.isoformat()}\nmetrics = ['click_rate']\nguardrails = ['hide_rate']\n"
        f"[experiments.trial.arms.control]\nshare = 0.5\n[experiments.trial.arms.new]\nshare = 0.5\n{new}\n{more}"
    )


def run() -> tuple[dict[str, dg.MetadataValue], dict[str, dg.AssetCheckEvaluation]]:
    """The page of a run, and its checks."""
    job = build_definitions(Larder(deployment="small")).resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey("experiment_report")])
    assert result.success
    checks = {check.check_name: check for check in result.get_asset_check_evaluations()}
    return dict(result.asset_materializations_for_node("experiment_report")[0].metadata), checks


def test_without_experiments_there_is_nothing_to_say(small: Ingested) -> None:
    page, checks = run()
    assert page["experiments"].value == 0
    assert all(check.passed for check in checks.values())


def test_an_experiment_that_nobody_can_watch_fails_the_check_and_hides_no_other(small: Ingested) -> None:
    declare(
        small,
        more="[experiments.typo]\nstart = 2020-01-01T00:00:00Z\nend = 2020-02-01T00:00:00Z\n"
        "guardrails = ['hides']\narms.a.share = 1.0\n",
    )
    with psycopg.connect(small.url) as connection:
        Trial(START, people=100).write(connection)
    page, checks = run()
    assert "| typo | faulty |" in str(page["verdicts"].value)
    assert "| trial | **keep running** |" in str(page["verdicts"].value)
    assert not checks["guardrails"].passed
    assert "there is no metric 'hides' (did you mean hide_rate?)" in str(checks["guardrails"].description)


def test_a_running_experiment_has_a_page_of_its_own(small: Ingested) -> None:
    declare(small)
    with psycopg.connect(small.url) as connection:
        Trial(START).write(connection)
    page, checks = run()
    assert "**keep running**" in str(page["verdicts"].value)
    assert "click_rate" in str(page["trial: numbers"].value)
    for name in ("lift", "split", "segments"):
        assert "data:image/png;base64," in str(page[f"trial: {name}"].value)
    assert {name: check.passed for name, check in checks.items()} == {"sample_ratio": True, "guardrails": True}
    place = Path(str(page["trial: files"].value))
    report = json.loads((place / "report.json").read_text())
    assert report["people"] == 900
    assert (place / "picture.png").stat().st_size > 5_000
    assert not (small.record.folder / "experiments.stopped.json").exists()
    # It names nobody.
    assert '"u1"' not in json.dumps(report)


def test_a_split_that_lost_people_fails_its_check_and_stops_nothing(small: Ingested) -> None:
    declare(small)
    with psycopg.connect(small.url) as connection:
        Trial(START, lost=0.5, treated=(0.3, 0.3)).write(connection)
    page, checks = run()
    assert "**broken split**" in str(page["verdicts"].value)
    assert not checks["sample_ratio"].passed
    assert "broken split" in str(checks["sample_ratio"].description)
    assert checks["guardrails"].passed
    assert not (small.record.folder / "experiments.stopped.json").exists()


def test_a_broken_guardrail_switches_off_and_takes_the_version_back(small: Ingested) -> None:
    home = Path(small.record.artifacts_url.removeprefix("file://"))
    versions = [write_release(home, seed) for seed in (1, 2)]
    with psycopg.connect(small.url) as connection:
        for version in versions:
            manifest = Manifest.from_json((home / "models" / "ranker" / version / MANIFEST_FILE).read_text())
            registry.register(connection, manifest, f"models/ranker/{version}")
            registry.record_gate(connection, version, True, {})
            connection.execute(
                f"CREATE TABLE item_vectors_{version} PARTITION OF item_vectors FOR VALUES IN ('{version}')"
            )
            connection.execute(
                "INSERT INTO item_vectors (model_version, item_id, vector, text_hash) "
                "SELECT %s, item_id, array_fill(0.1, ARRAY[%s])::halfvec, 'h' FROM items",
                (version, manifest.dim),
            )
            connection.commit()
        registry.promote(connection, versions[1])
        Trial(START, treated=(0.3, 0.3)).write(connection)
    declare(small, new=f'model_version = "{versions[1]}"')
    page, checks = run()
    assert "**stop**" in str(page["verdicts"].value)
    assert checks["sample_ratio"].passed
    assert not checks["guardrails"].passed
    assert "breaks the guardrail hides per shown item" in str(checks["guardrails"].description)
    stops = json.loads((small.record.folder / "experiments.stopped.json").read_text())
    assert "breaks the guardrail" in stops["trial"]["reason"]
    with psycopg.connect(small.url) as connection:
        serving = registry.read_alias(connection)
    assert serving is not None
    assert serving.version == versions[0]
    assert json.loads((home / CHAMPION_POINTER).read_text())["version"] == versions[0]
    # The next day's run says the same and does nothing twice: an older version is not rolled back as well.
    again, _ = run()
    assert "rolled back" not in str(again["verdicts"].value)
    with psycopg.connect(small.url) as connection:
        now = registry.read_alias(connection)
    assert now == serving


def test_templates_stand_offline_beside_online(small: Ingested) -> None:
    declare(small, new='wish_template = "wish.v2"')
    with psycopg.connect(small.url) as connection:
        Trial(START, treated=(0.45, 0.1)).write(connection)
        for version, lift in (("wish.v1", 2.0), ("wish.v2", 3.0)):
            connection.execute(
                "INSERT INTO prompt_evaluations (version, kind, conditions, figures) VALUES (%s, 'wish', 'same', %s)",
                (version, json.dumps({"genre_lift": lift})),
            )
    page, _ = run()
    assert "wish.v2 | 3.0000" in str(page["trial: templates"].value)
    assert "people prefer wish.v2 over wish.v1; offline (genre_lift) said the same" in str(page["trial: notes"].value)
