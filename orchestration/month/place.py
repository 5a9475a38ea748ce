"""The month's own deployment: removed and made anew, with a database, a lake and artefacts that nothing else uses."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from infra import postgres
from infra.deployment import Deployment, home
from infra.feature_tables import ensure_view_tables
from orchestration.compute.lake import Lake
from orchestration.month.plan import Plan
from schemas.errors import SettingsError
from schemas.manifest import ENCODER_PATH

NAME = "month"


@dataclass(frozen=True, slots=True)
class Place:
    """A migrated, empty database, and the folder for everything else."""

    url: str
    folder: Path

    @property
    def lake(self) -> Lake:
        return Lake((self.folder / "lake").as_uri())

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def artifacts_url(self) -> str:
        return self.artifacts.as_uri()

    @property
    def encoder(self) -> Path:
        return self.artifacts / ENCODER_PATH

    @property
    def experiments(self) -> Path:
        return self.folder / "experiments.toml"

    @contextmanager
    def connect(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection in UTC, committed at the end."""
        with psycopg.connect(self.url, options="-c TimeZone=UTC", application_name="larder-month") as connection:
            yield connection


def fresh(plan: Plan) -> Place:
    """The deployment `month`, empty. The current deployment stays the current one, and whatever the environment names as
    database, lake or artefacts is left alone. Raises SettingsError while another month is being simulated there."""
    folder = home() / NAME
    if (running := _server(folder / "postgres")) is not None:
        raise SettingsError(
            f"{folder} is in use: its database runs as process {running}; wait for the other `make simulate-month` or "
            f"`make serve`, or end it with `kill {running}`"
        )
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise SettingsError(f"{folder} could not be removed; remove it by hand and run again")
    record = Deployment(NAME, None, plan.world.start)
    record.save(current=False)
    url = postgres.start_embedded(folder / "postgres")
    postgres.migrate(url)
    postgres.claim(url, NAME)
    ensure_view_tables(url)
    return Place(url, folder)


def _server(folder: Path) -> int | None:
    """The process of the server whose data lie in `folder`, if it runs."""
    try:
        process = int((folder / "postmaster.pid").read_text().split()[0])
        os.kill(process, 0)
    except (FileNotFoundError, ProcessLookupError, ValueError, IndexError):
        return None
    except PermissionError:
        pass  # somebody else's process by now, or their server
    return process
