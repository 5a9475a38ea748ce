"""A deployment: one folder with its own database, lake and artefacts, and what must be remembered about it.

.larder/current                  name of the deployment last run
.larder/<name>/deployment.json   source, first partition, shift
.larder/<name>/experiments.toml   what is tried out, if anything (docs/experiments.md)
.larder/<name>/{postgres,lake,artifacts,dagster}/
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from schemas.errors import SettingsError

DEFAULT_NAME = "simulated"
DEFAULT_DAYS = 120
RECORD = "deployment.json"
RULES = "rules.toml"


def home() -> Path:
    """Where deployments live: `LARDER_HOME`, else `.larder` in the working directory."""
    return Path(os.environ.get("LARDER_HOME", ".larder")).resolve()


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a run must know before it starts.

    `data` is what DATA named (None: the simulator). `start_date` is the first partition, in shifted time;
    `shift_days` is added to every time of a historical source.
    """

    name: str
    data: str | None
    start_date: date
    shift_days: int = 0

    @property
    def folder(self) -> Path:
        return home() / self.name

    @property
    def lake_url(self) -> str:
        return os.environ.get("LAKE_URL") or (self.folder / "lake").as_uri()

    @property
    def artifacts_url(self) -> str:
        return os.environ.get("ARTIFACTS_URL") or (self.folder / "artifacts").as_uri()

    @property
    def rules(self) -> str:
        """Where the rules of what may be shown are, a path or `s3://bucket/key`: what LARDER_RULES names, else `rules.toml`
        in the folder; empty if that is not there."""
        file = self.folder / RULES
        return os.environ.get("LARDER_RULES") or (str(file) if file.exists() else "")

    @property
    def dagster_home(self) -> Path:
        return self.folder / "dagster"

    @property
    def experiments(self) -> str:
        """Where experiments are declared, a path or `s3://bucket/key`; nothing need be there."""
        return os.environ.get("LARDER_EXPERIMENTS") or str(self.folder / "experiments.toml")

    def save(self, *, current: bool = True) -> None:
        """Write the record and, unless told not to, make this the current deployment; both files appear whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = asdict(self) | {"start_date": self.start_date.isoformat()}
        _write(self.folder / RECORD, json.dumps(record, indent=1) + "\n")
        if current:
            _write(home() / "current", self.name + "\n")


def name_for(data: str | None) -> str:
    """The deployment's name for a source: the last part of DATA, or `simulated`."""
    if data is None:
        return DEFAULT_NAME
    last = data.rstrip("/").rsplit("/", 1)[-1]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-.")
    if not name:
        raise SettingsError(f"DATA {data!r} gives no name for a deployment; name a folder or s3://bucket/prefix")
    return name


def wanted() -> str | None:
    """The deployment that `DEPLOYMENT` names, if it is set. Raises SettingsError for what is no name of a folder."""
    name = os.environ.get("DEPLOYMENT")
    if name and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise SettingsError(f"DEPLOYMENT is {name!r}; give letters, digits, '_', '-' and '.', such as DEPLOYMENT=shop")
    return name or None


def load(name: str) -> Deployment | None:
    """The recorded deployment `name`, or None if it was never run. Raises SettingsError for a broken record."""
    file = home() / name / RECORD
    if not file.exists():
        return None
    try:
        raw = json.loads(file.read_text())
        return Deployment(raw["name"], raw["data"], date.fromisoformat(raw["start_date"]), int(raw["shift_days"]))
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{file} is not a deployment record ({error}); move the folder away and run again"
        ) from error


def current() -> Deployment:
    """The deployment that `DEPLOYMENT` names, else the one last run, else a fresh simulated one (not yet saved)."""
    name = wanted()
    if name:
        found = load(name)
        if found is None:
            known = sorted(entry.parent.name for entry in home().glob(f"*/{RECORD}"))
            raise SettingsError(
                f"there is no deployment {name!r}; known: {', '.join(known) or 'none yet, run `make run` first'}"
            )
        return found
    pointer = home() / "current"
    found = load(pointer.read_text().strip()) if pointer.exists() else None
    return found or Deployment(DEFAULT_NAME, None, datetime.now(UTC).date() - timedelta(days=DEFAULT_DAYS))


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(file)
