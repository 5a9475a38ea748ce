"""The folder itself: which parts it has, which are missing and how to get them, and the sums that say it was not changed.

index.md            what is where, for a reader who knows nothing of Larder
model-card.md       the model that serves: what it was made from, how good it is, for whom, what it had to prove
data-map.md         what personal data lies where, why and for how long
rights.md           who may do what: roles and their grants as the database has them, request keys without secrets
receipts.md         erasures, exports, consents and retention in numbers; names nobody
prompts.md          which wording of each kind is used, and what it scored
dependencies.txt    versions of everything that was installed
reports/            fairness, drift, experiments and the rest, as their assets wrote them
manifest.json       size and SHA-256 of each of these
SHA256SUMS          the same and the manifest's own, as `sha256sum -c` reads it
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psycopg

from infra import data_map
from infra.audit import model_card, records, rights
from infra.deployment import Deployment
from schemas.errors import SettingsError

MANIFEST, SUMS, INDEX = "manifest.json", "SHA256SUMS", "index.md"
REPORTS = "reports"
EXPECTED: dict[str, str] = {
    "drift": "materialise the drift asset (asset group `monitoring`)",
    "fairness": "materialise the fairness asset (asset group `monitoring`)",
    "experiments": "declare an experiment and materialise experiment_report once it has begun",
    "retention": "let the Dagster job `retention` run once; its schedule is off until switched on",
}
"""Reports that a bundle should hold, and how to get one that is not there. Others that are there are taken, too."""
EXPERIMENTS, EXPERIMENT_REPORT = "experiments", "report.json"
"""Experiments have a report each, `reports/experiments/<name>/report.json`."""
_REPORT_FILES = (".json", ".png", ".md")

Connection = psycopg.Connection[Any]


@dataclass(slots=True)
class Bundle:
    """What was written: one line about each file, and what is missing with the way to get it."""

    folder: Path
    files: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, content: str | bytes, about: str) -> None:
        """Write one file of the bundle."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        self.files[name] = about


def write(folder: Path, connection: Connection, record: Deployment, at: datetime) -> Bundle:
    """Write the bundle of the deployment `record` to `folder`, in place of one that is there.

    It is made beside and put in its place whole. Raises SettingsError if `folder` is something else than a bundle.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise SettingsError(f"{folder} is there and is no audit bundle; give another folder with OUT=")
    beside = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    made = Bundle(beside)
    _model_card(made, connection)
    made.add(
        "data-map.md",
        data_map.text().replace("[privacy](privacy.md)", "docs/privacy.md"),
        "what personal data lies where, why, how long, and who may read it",
    )
    made.add(
        "rights.md", rights.text(connection), "who may do what: roles and grants as the database has them, keys, scopes"
    )
    made.add("receipts.md", records.receipts(connection), "erasures, exports and consents in numbers; names nobody")
    made.add("prompts.md", records.prompts(connection), "which wording of each kind is used, and what it scored")
    made.add("dependencies.txt", dependencies(), "name and version of everything that was installed")
    _reports(made, record.folder / REPORTS)
    made.add(INDEX, _index(made, connection, record, at), "this page")
    _seal(made, record, at)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    made.folder = folder
    return made


def verify(folder: Path) -> list[str]:
    """What is wrong with the bundle in `folder`, one line a fault: changed, missing, or never part of it.

    Raises SettingsError if it is no bundle.
    """
    sums = folder / SUMS
    if not sums.is_file() or not (folder / MANIFEST).is_file():
        raise SettingsError(f"{folder} is no audit bundle: it has no {SUMS} and {MANIFEST}; `make audit` writes one")
    listed: dict[str, str] = {}
    for line in sums.read_text(encoding="utf-8").splitlines():
        said, _, name = line.partition("  ")
        listed[name] = said
    faults: list[str] = []
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - {SUMS}
    for name in sorted(there | set(listed)):
        if name not in there:
            faults.append(f"{name} is missing")
        elif name not in listed:
            faults.append(f"{name} was not written with the bundle")
        elif _sha256(folder / name) != listed[name]:
            faults.append(f"{name} was changed")
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        told = {name: entry["sha256"] for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return [*faults, f"{MANIFEST} cannot be read"]
    # Two lists of the same: who changes a file and its sum in one of them is found by the other.
    faults += [
        f"{MANIFEST} and {SUMS} differ about {name}"
        for name in sorted(set(told) | set(listed) - {MANIFEST})
        if told.get(name) != listed.get(name)
    ]
    return faults


def digest(folder: Path) -> str:
    """The one number that stands for the whole bundle: hand it over by another way than the folder."""
    return _sha256(folder / SUMS)


def dependencies() -> str:
    """`name==version` of every distribution in this environment, sorted."""
    found = {f"{one.name}=={one.version}" for one in metadata.distributions() if one.name}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def _model_card(made: Bundle, connection: Connection) -> None:
    card = model_card.read(connection)
    if card is None:
        made.missing["model-card.md"] = "no model is released; `make run` trains and releases one if it passes its gate"
        return
    figures: dict[str, bytes] = model_card.figures(card)
    made.add("model-card.md", model_card.text(card, tuple(figures)), f"the model that serves, version {card.version}")
    for name, content in figures.items():
        made.add(name, content, "a figure of the model card")
    made.add("model-manifest.json", card.manifest_json, "the artefact's own manifest; its files by SHA-256")
    made.add(
        "gate-record.json", json.dumps(card.gate, indent=1, sort_keys=True) + "\n", "what the version had to prove"
    )


def _reports(made: Bundle, folder: Path) -> None:
    """Copy the latest report of each name with its pictures; those that should be there and are not are missing."""
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    for name in found:
        if (folder / name / "latest.json").is_file():
            _copy(made, folder / name, f"{REPORTS}/{name}", f"the last report on {name}")
    _experiments(made, folder / EXPERIMENTS)
    for name, how in EXPECTED.items():
        if not any(file.startswith(f"{REPORTS}/{name}/") for file in made.files):
            made.missing[f"{REPORTS}/{name}"] = how


def _experiments(made: Bundle, folder: Path) -> None:
    """Copy the latest report of each experiment: one that ended keeps its last."""
    found = sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    for one in found:
        if (one / EXPERIMENT_REPORT).is_file():
            _copy(made, one, f"{REPORTS}/{EXPERIMENTS}/{one.name}", f"the last report on the experiment {one.name}")


def _copy(made: Bundle, folder: Path, name: str, about: str) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _REPORT_FILES and not file.name.startswith("."):
            made.add(f"{name}/{file.name}", file.read_bytes(), about)


def _index(made: Bundle, connection: Connection, record: Deployment, at: datetime) -> str:
    migration = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    lines = [
        f"# Audit of deployment {record.name}",
        "",
        f"Written {at:%Y-%m-%d %H:%M} UTC by Larder {metadata.version('larder')}, schema revision "
        f"{migration[0] if migration else 'unknown'}. All figures from the database are of one moment.",
        "",
        "## What is here",
        "",
        "| file | what it says |",
        "| --- | --- |",
        *(f"| [{name}]({name}) | {about} |" for name, about in sorted(made.files.items())),
        "",
        "## What is missing",
        "",
        *([f"- **{name}**: {how}" for name, how in sorted(made.missing.items())] or ["Nothing."]),
        "",
        "## How to check it",
        "",
        "In this folder, without any of our code:",
        "",
        f"    sha256sum -c {SUMS}",
        "",
        f"With it, `make audit VERIFY=<folder>`: that also finds files that were added, and holds {MANIFEST} against {SUMS}. "
        f"Sums show that nothing changed since the bundle was sealed, not who sealed it: ask for the SHA-256 of {SUMS}, "
        "which `make audit` prints, by another way. What the model's files should be is in model-manifest.json: its "
        "version is the hash of that very text (`sha256sum model-manifest.json`, the first 16 digits).",
        "",
    ]
    return "\n".join(lines)


def _seal(made: Bundle, record: Deployment, at: datetime) -> None:
    files = {
        name: {"sha256": _sha256(made.folder / name), "size_bytes": (made.folder / name).stat().st_size}
        for name in sorted(made.files)
    }
    manifest = {"deployment": record.name, "written_at": at.isoformat(), "files": files, "missing": made.missing}
    (made.folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sums = {name: entry["sha256"] for name, entry in files.items()} | {MANIFEST: _sha256(made.folder / MANIFEST)}
    (made.folder / SUMS).write_text(
        "".join(f"{said}  {name}\n" for name, said in sorted(sums.items())), encoding="utf-8"
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
