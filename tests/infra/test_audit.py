"""The audit bundle: it holds what it says, names what is missing and nobody, and a changed byte is found."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import psycopg
import pytest

from infra import keys, registry
from infra.audit import bundle, rights
from infra.audit.__main__ import main
from infra.deployment import Deployment
from orchestration.compute.forget import forget
from orchestration.compute.lake import Lake
from schemas.keys import take_apart
from schemas.manifest import ArtifactFile, Manifest
from schemas.prompts import DEFAULTS

ANNA = "anna.unmistakable@example.org"


def manifest(**quality: Any) -> Manifest:
    row = {"hr": {"5": 0.2, "10": 0.3, "50": 0.5}, "ndcg": {"5": 0.1, "10": 0.123456, "50": 0.2}}
    rows = [{"name": name, **row, "mrr": row["ndcg"], "interval": [0.1, 0.15]} for name in ("popularity", "ranker")]
    segment = {"name": "all", "labels": 40, "ndcg": 0.12, "hr": 0.3, "low": 0.1, "high": 0.14}
    measured = {
        "labels": 40,
        "people": 30,
        "rows": rows,
        "gains": {"popularity": {"mean": 0.02, "low": 0.01, "high": 0.03}},
        "segments": {"ranker": [segment, segment | {"name": "new people"}]},
    }
    return Manifest(
        name="ranker",
        size="small",
        dim=64,
        feature_fingerprint="f",
        context_features=("user_activity.events_7d",),
        candidate_features=("item_activity.events_7d",),
        encoder_version="e",
        item_template=DEFAULTS["item"],
        wish_template=DEFAULTS["wish"],
        trained_until="2030-01-01T00:00:00+00:00",
        seed=7,
        files={"ranker.cpu-int8.onnx": ArtifactFile(10, "a" * 64)},
        quality=quality or {"leave_one_out": measured, "time_split": measured},
        parity={"int8": {"ndcg_loss_rate": 0.001, "refused": None}},
        latency_ms={"cpu-int8_p50": 1.5},
    )


@pytest.fixture
def record(larder_home: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """A deployment with a released model, a key, somebody forgotten, somebody who refused, and one report of the watch."""
    monkeypatch.setenv("DATABASE_URL", database)
    made = Deployment("audited", None, date(2030, 1, 1))
    made.save()
    with psycopg.connect(database) as connection:
        model = manifest()
        registry.register(connection, model, f"models/ranker/{model.version}")
        registry.record_gate(connection, model.version, True, {"words": ["better than popularity\nby far"]})
        registry.promote(connection, model.version)
        key = keys.create(connection, "the shop", ["recommend"])
        for user in (ANNA, "bo"):
            connection.execute("INSERT INTO people (user_id) VALUES (%s)", (user,))
            connection.execute("INSERT INTO consents (user_id, personalise) VALUES (%s, false)", (user,))
        connection.execute("INSERT INTO erasure_requests (request_id, user_id) VALUES ('r', 'bo')")
    (larder_home / "secret").write_text(key)
    forget(ANNA, url=database, lake=Lake(made.lake_url), artifacts_url=made.artifacts_url)
    drift = made.folder / "reports" / "drift"
    drift.mkdir(parents=True)
    (drift / "latest.json").write_text('{"psi": 0.1}')
    (drift / "psi.png").write_bytes(b"\x89PNG")
    (drift / ".half-written.json").write_text("{")
    return made


@pytest.fixture
def folder(record: Deployment, tmp_path: Path) -> Path:
    assert main(["--out", str(tmp_path / "bundle")]) == 0
    return tmp_path / "bundle"


def test_it_holds_what_it_says_and_names_what_is_missing(
    folder: Path, record: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    index = (folder / "index.md").read_text()
    linked = set(re.findall(r"\]\(([^)]+)\)", index))
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert there == linked | {"index.md", "manifest.json", "SHA256SUMS"}
    assert {"model-card.md", "data-map.md", "rights.md", "receipts.md", "prompts.md", "dependencies.txt"} <= there
    assert {"reports/drift/latest.json", "reports/drift/psi.png"} <= there
    missing = json.loads((folder / "manifest.json").read_text())["missing"]
    assert set(missing) == {"reports/fairness", "reports/experiments", "reports/retention"}
    for name in missing:
        assert f"**{name}**" in index
    card = (folder / "model-card.md").read_text()
    assert "0.1235" in card
    assert "- better than popularity by far" in card
    assert "new people" in card
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", card):
        assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n")
    assert len(list((folder / "figures").iterdir())) == 4
    # The model's version is the hash of the manifest that is handed over: an outsider can see that.
    assert hashlib.sha256((folder / "model-manifest.json").read_bytes()).hexdigest()[:16] == manifest().version
    assert "psycopg==" in (folder / "dependencies.txt").read_text()
    # Written again it takes the place of the one before.
    assert main(["--out", str(folder)]) == 0
    assert "checked" in capsys.readouterr().out


def test_it_holds_the_last_report_of_each_experiment(record: Deployment, tmp_path: Path) -> None:
    place = record.folder / "reports" / "experiments"
    for name in ("canary", "wording", "unfinished"):
        (place / name).mkdir(parents=True)
    for name in ("canary", "wording"):
        # As `orchestration.compute.experiments.reports` writes them, while it writes the next.
        (place / name / "report.json").write_text(json.dumps({"experiment": name}))
        (place / name / "picture.png").write_bytes(b"\x89PNG")
        (place / name / ".report.json.123").write_text("{")
    folder = tmp_path / "bundle"
    assert main(["--out", str(folder)]) == 0
    there = {file.relative_to(folder / "reports").as_posix() for file in (folder / "reports").rglob("*.*")}
    assert there == {"drift/latest.json", "drift/psi.png"} | {
        f"experiments/{name}/{file}" for name in ("canary", "wording") for file in ("report.json", "picture.png")
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["missing"]) == {"reports/fairness", "reports/retention"}
    assert "the last report on the experiment wording" in (folder / "index.md").read_text()
    assert main(["--verify", str(folder)]) == 0
    (folder / "reports/experiments/canary/report.json").write_text("{}")
    assert main(["--verify", str(folder)]) == 1


def test_it_names_nobody_and_holds_no_secret(folder: Path, larder_home: Path) -> None:
    parts = take_apart((larder_home / "secret").read_text())
    assert parts is not None
    key_id, secret = parts
    everything = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    assert ANNA.encode() not in everything
    assert secret.encode() not in everything
    assert hashlib.sha256(secret.encode()).hexdigest().encode() not in everything
    assert key_id in (folder / "rights.md").read_text()
    receipts = (folder / "receipts.md").read_text()
    assert "public.people 1" in receipts
    assert "1 wait to be fulfilled" in receipts
    assert "0 agreed, 1 refused" in receipts


@pytest.mark.parametrize("how", ["changed", "removed", "added", "sums too"])
def test_what_was_done_to_it_afterwards_is_found(folder: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--verify", str(folder)]) == 0
    assert f"SHA-256 of SHA256SUMS: {bundle.digest(folder)}" in capsys.readouterr().out
    card, sums = folder / "model-card.md", folder / "SHA256SUMS"
    if how == "removed":
        card.unlink()
    elif how == "added":
        (folder / "reports" / "praise.md").write_text("very good")
    else:
        card.write_text(card.read_text().replace("0.1235", "0.9235"))
    if how == "sums too":
        changed = hashlib.sha256(card.read_bytes()).hexdigest()
        sums.write_text(re.sub(r"^\w+(?=  model-card\.md$)", changed, sums.read_text(), flags=re.MULTILINE))
    assert main(["--verify", str(folder)]) == 1
    said = capsys.readouterr().err
    expected = {
        "changed": "model-card.md was changed",
        "removed": "model-card.md is missing",
        "added": "reports/praise.md was not written with the bundle",
        "sums too": "manifest.json and SHA256SUMS differ about model-card.md",
    }
    assert expected[how] in said


def test_an_outsider_checks_it_with_what_every_machine_has(folder: Path) -> None:
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder, check=False).returncode == 0
    with (folder / "rights.md").open("a") as file:
        file.write("\n")
    assert subprocess.run(check, cwd=folder, check=False, capture_output=True).returncode != 0


def test_the_rights_are_those_of_the_database(connection: psycopg.Connection[Any]) -> None:
    held = rights.grants(connection)
    assert held["larder_function"]["public.user_history"] == "SELECT"
    assert held["larder_function"]["public.items"] == "SELECT (item_id, title, categories, attributes, available_at)"
    assert "larder_writer" not in held
    connection.execute("GRANT SELECT ON people TO larder_writer")
    connection.execute("GRANT UPDATE (title) ON items TO PUBLIC")
    held = rights.grants(connection)
    assert held["larder_writer"] == {"public.people": "SELECT"}
    assert held["PUBLIC"] == {"public.items": "UPDATE (title)"}
    text = rights.text(connection)
    assert "| POST /people/{user_id}/consent | write | consent |" in text
    assert "larder_writer" in next(line for line in text.splitlines() if line.startswith("| `accept_events(jsonb)`"))


def test_a_folder_of_somebody_elses_is_left_alone(record: Deployment, tmp_path: Path) -> None:
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter-1.md").write_text("long work")
    assert main(["--out", str(mine)]) == 1
    assert (mine / "chapter-1.md").read_text() == "long work"
    assert main(["--verify", str(mine)]) == 1


def test_without_a_model_it_says_so(larder_home: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", database)
    made = Deployment("empty", None, date(2030, 1, 1))
    made.save()
    assert main([]) == 0
    (written,) = (made.folder / "audit").iterdir()
    assert "**model-card.md**: no model is released" in (written / "index.md").read_text()
    assert bundle.verify(written) == []
