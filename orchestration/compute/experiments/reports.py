"""Every running experiment reported: analysed, written as files, and stopped where a guardrail is broken."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg

from inference.declared import stopped_place
from infra import registry
from infra.deploy import roll_back_model
from orchestration.compute.experiments.analysis import Report, analyse, to_json
from orchestration.compute.experiments.decide import Verdict
from orchestration.compute.experiments.declared import Experiment, read_declared
from orchestration.compute.experiments.picture import picture
from orchestration.compute.experiments.reading import read_panel
from orchestration.compute.experiments.stops import read_stops, stop
from orchestration.compute.experiments.templates import Templates, compare_templates
from orchestration.compute.lake import Lake
from orchestration.compute.off_policy import NoSupport
from orchestration.compute.off_policy_log import judge_shadow
from orchestration.compute.telling import Say, silent
from schemas.errors import DefinitionError, DeployError, GateError

REPORTED_DAYS = 7
"""An experiment is reported for so many days after its end: events of its last lists still come in."""
FOLDER = "reports/experiments"


@dataclass(frozen=True, slots=True)
class Reported:
    """What became of one experiment: its report, or why there is none; what was done about it.

    `shadows` says for each shadow arm what its lists would be worth, or why that cannot be told.
    """

    name: str
    report: Report | None
    reason: str | None = None
    faulty: bool = False
    """True if its declaration is wrong: nobody watches it then."""
    templates: Templates | None = None
    shadows: dict[str, str] = field(default_factory=dict)
    done: tuple[str, ...] = ()
    """What was switched off or rolled back, in words."""
    file: Path | None = None


def report_all(
    connection: psycopg.Connection[Any],
    lake: Lake,
    folder: Path,
    artifacts_url: str,
    declarations: str,
    now: datetime,
    say: Say = silent,
) -> list[Reported]:
    """Report the experiments declared at `declarations`, a path or an `s3://bucket/key`, that run or ended lately, and act on
    broken guardrails.

    Files go below `folder`/reports/experiments/<name>/. Raises DefinitionError if the declarations cannot be read.
    """
    record = stopped_place(declarations)
    stops = read_stops(record)
    found = []
    for name, experiment in read_declared(declarations).items():
        if isinstance(experiment, DefinitionError):
            say(str(experiment))
            found.append(Reported(name, None, str(experiment), faulty=True))
            continue
        stopped = stops.get(experiment.name)
        ends = [at for at in (experiment.end, stopped[0] if stopped else None) if at is not None]
        over_at = min(ends) if ends and min(ends) <= now else None
        if experiment.start > now or (over_at and over_at + timedelta(days=REPORTED_DAYS) < now):
            continue
        reported = _report(connection, lake, experiment, over_at or now, now, over=over_at is not None)
        if reported.report is not None:
            done = () if stopped else _act(connection, artifacts_url, record, reported.report, now)
            reported = _write(folder, reported, done)
        say(f"{experiment.name}: {reported.report.decision.words if reported.report else reported.reason}")
        for line in reported.done:
            say(f"{experiment.name}: {line}")
        found.append(reported)
    return found


def _report(
    connection: psycopg.Connection[Any],
    lake: Lake,
    experiment: Experiment,
    until: datetime,
    now: datetime,
    *,
    over: bool,
) -> Reported:
    try:
        panel = read_panel(connection, lake, experiment, until, now)
    except DefinitionError as error:
        return Reported(experiment.name, None, str(error))
    report = analyse(experiment, panel, now, ended=over)
    shadows = {}
    for arm in experiment.shadows:
        try:
            value, lead = judge_shadow(connection, lake, experiment.name, arm.name, experiment.start, until)
            shadows[arm.name] = (
                f"{arm.name} would get {value.words()}; {lead.value:+.3f} ({lead.low:+.3f} to {lead.high:+.3f}) against the ranker "
                "that was explored"
            )
        except NoSupport as error:
            shadows[arm.name] = f"what {arm.name} is worth cannot be told: {error}"
    return Reported(experiment.name, report, templates=compare_templates(connection, report), shadows=shadows)


def _act(
    connection: psycopg.Connection[Any], artifacts_url: str, stops: str, report: Report, now: datetime
) -> tuple[str, ...]:
    """Switch an experiment with a broken guardrail off, and take its version back where that serves everybody."""
    decision = report.decision
    if decision.verdict is not Verdict.STOP or not decision.breached:
        return ()
    done = []
    if stop(stops, report.experiment.name, now, decision.words):
        done.append(f"switched off: everybody is served as without it from now on ({stops.rpartition('/')[2]})")
    versions = {
        arm.model_version
        for arm in report.experiment.treated
        if any(guard.arm == arm.name for guard in decision.breached)
    }
    champion = registry.read_alias(connection)
    if champion is not None and champion.version in versions:
        try:
            was, is_now = roll_back_model(connection, artifacts_url, None)
            done.append(f"rolled back: model {is_now} serves instead of {was}")
        except (DeployError, GateError) as error:
            done.append(f"not rolled back, do it by hand: {error}")
    return tuple(done)


def _write(folder: Path, reported: Reported, done: tuple[str, ...]) -> Reported:
    """The report as JSON and PNG below `folder`, each whole or not at all."""
    assert reported.report is not None
    place = folder / FOLDER / reported.name
    place.mkdir(parents=True, exist_ok=True)
    document = to_json(reported.report) | {
        "templates": asdict(reported.templates) if reported.templates else None,
        "shadows": reported.shadows,
        "done": list(done),
    }
    _whole(place / "picture.png", picture(reported.report))
    _whole(place / "report.json", (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    return replace(reported, done=done, file=place / "report.json")


def _whole(file: Path, content: bytes) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(file)
