"""`make deploy` and `make rollback`: the released model and its function to a cloud, and the way back.

    python -m infra.deploy deploy [--target aws|cloud-run] [--plan]
    python -m infra.deploy rollback [--what model|function] [--target …] [--version …]
    python -m infra.deploy bake FOLDER        what an image may be built with; see infra/images/

Dagster's asset `recommend_function` calls `deploy` as well; none of this needs Dagster.
What is deployed is the champion of the current deployment. What it would cost is `infra.costs`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psycopg

from inference import artifacts, telemetry
from infra import costs, postgres, registry, release
from infra import deployment as deployments
from infra.arguments import MakeParser
from infra.deploy_settings import (
    TARGETS,
    DeploySettings,
    Target,
    check_target,
    read_deploy_settings,
    read_target,
)
from infra.deployment import Deployment
from infra.function_settings import DECLARED
from infra.release import Progress, Release
from schemas.errors import DeployError, LarderError
from schemas.manifest import CHAMPION_POINTER


class Cloud(Protocol):
    """A target: each method looks at what is there first, and changes only what differs."""

    @property
    def place(self) -> str: ...

    def plan(self, released: Release) -> list[str]: ...

    def deploy(self, released: Release, carrier: Mapping[str, str], progress: Progress) -> bool: ...

    def roll_back(self, progress: Progress) -> str: ...

    def urls(self) -> dict[str, str]: ...


def open_cloud(settings: DeploySettings) -> Cloud:
    """The target that `settings` name. Raises DeployError without credentials for it."""
    if settings.target == "aws":
        from infra.aws.target import Aws

        return Aws.open(settings)
    from infra.cloud_run.target import CloudRun

    return CloudRun.open(settings)


def deploy(
    record: Deployment, database_url: str, target: Target, progress: Progress
) -> tuple[Release, dict[str, str], bool]:
    """Bring the function of `record` at `target` to the champion: release, where it is reached, whether anything changed.

    The smoke request hangs under the current trace. Raises SettingsError, DeployError or ArtifactError.
    """
    settings = read_deploy_settings(record, target)
    if not settings.experiments and Path(record.experiments).is_file():
        progress(
            f"  {record.experiments} is not the function's: for experiments there, put it at "
            f"{settings.declared_url}/{DECLARED}/experiments.toml and name that in LARDER_EXPERIMENTS, here and for Dagster"
        )
    with psycopg.connect(database_url) as connection:
        released = release.read(connection, record.artifacts_url)
    cloud = open_cloud(settings)
    with telemetry.span(
        "recsys.deploy", attributes={"recsys.model_version": released.version, "recsys.target": target}
    ):
        changed = cloud.deploy(released, telemetry.inject(), progress)
    return released, cloud.urls(), changed


def roll_back_model(connection: psycopg.Connection[object], artifacts_url: str, version: str | None) -> tuple[str, str]:
    """Let `version`, or the champion before this one, serve: `(from, to)`. Functions follow with their next request.

    Raises GateError if the database refuses it, DeployError if there is nothing to return to.
    """
    now = registry.read_alias(connection)
    if now is None:
        raise DeployError("no model is released, so there is nothing to roll back; the floor serves")
    wanted = version or registry.released_before(connection, now.version)
    if wanted is None:
        raise DeployError(
            f"no version that passed its gate is older than the champion {now.version}; name one with VERSION=…, or train anew"
        )
    row = connection.execute("SELECT path FROM model_versions WHERE version = %s", (wanted,)).fetchone()
    if row is None:
        raise DeployError(f"there is no model version {wanted!r}; the table model_versions has all of them")
    registry.promote(connection, wanted)
    connection.commit()
    pointer = {"version": wanted, "path": row[0]}  # type: ignore[index]
    try:
        artifacts.put(artifacts_url, CHAMPION_POINTER, json.dumps(pointer).encode())
    except Exception as error:
        raise DeployError(
            f"model {wanted} serves, but the pointer that functions use without a database could not be written "
            f"({type(error).__name__}); run `make rollback VERSION={wanted}` once it can"
        ) from error
    return now.version, wanted


def _deploy(target: Target, plan: bool) -> int:
    record = deployments.current()
    settings = read_deploy_settings(record, target)
    url = postgres.database_url(record)
    postgres.check(url)
    with psycopg.connect(url) as connection:
        released = release.read(connection, record.artifacts_url)
    cloud = open_cloud(settings)
    print(f"deployment {record.name}, model {released.version} → {settings.name} in {cloud.place}")
    lines = cloud.plan(released)
    print("what changes:" if lines else "nothing to change")
    for line in lines:
        print(f"  {line}")
    bill, assumed = costs.estimate(settings)
    print(f"costs about ${sum(line.dollars for line in bill):,.2f} a month ({assumed}):")
    for cost in bill:
        print(f"  {cost.what:<22} ${cost.dollars:,.2f}")
    if plan:
        print("this was a plan: nothing was changed")
        return 0
    _, urls, changed = deploy(record, url, target, lambda line: print(line, flush=True))
    for name, where in urls.items():
        print(f"  {name}: {where}")
    print(f"{'deployed' if changed else 'nothing was changed'}: {settings.name} answers with model {released.version}")
    return 0


def _roll_back(what: str, target: Target, version: str | None) -> int:
    record = deployments.current()
    if what == "function":
        open_cloud(read_deploy_settings(record, target)).roll_back(print)
        return 0
    if not os.environ.get("DATABASE_URL") and deployments.load(record.name) is None:
        raise DeployError(f"there is no deployment in {deployments.home()}: run `make run` first")
    url = postgres.database_url(record)
    postgres.check(url)
    with psycopg.connect(url) as connection:
        before, after = roll_back_model(connection, record.artifacts_url, version)
    if before == after:
        print(f"model {after} serves already")
    else:
        print(f"model {after} serves again, {before} no longer; functions follow with their next request")
    return 0


def _bake(folder: Path) -> int:
    if folder.exists() and any(folder.iterdir()):
        raise DeployError(f"{folder} is not empty; name an empty folder")
    record = deployments.current()
    url = postgres.database_url(record)
    with psycopg.connect(url) as connection:
        released = release.read(connection, record.artifacts_url)
    with release.gathered(released) as gathered:
        shutil.copytree(gathered, folder, dirs_exist_ok=True)
    print(f"model {released.version} and the encoder are in {folder}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = MakeParser(prog="python -m infra.deploy", description="Release to a cloud function, or go back.")
    commands = parser.add_subparsers(dest="command", required=True)
    deploying = commands.add_parser("deploy", help="bring the function to the released model; safe to repeat")
    deploying.add_argument("--plan", action="store_true", help="only print what would change and what it costs")
    back = commands.add_parser(
        "rollback",
        command="make rollback [WHAT=model|function] [VERSION=…] [TARGET=aws|cloud-run]",
        help="let what was before answer again",
    )
    back.add_argument("--what", choices=["model", "function"], default="model")
    back.add_argument("--version", help="the model version to return to (default: the one released before)")
    for command in (deploying, back):
        command.add_argument("--target", help=f"{' or '.join(TARGETS)} (default: LARDER_DEPLOY_TARGET, else aws)")
    baking = commands.add_parser("bake", help="lay out what an image may be built with")
    baking.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "bake":
            return _bake(options.folder)
        target = check_target(options.target) if options.target else read_target() or "aws"
        if options.command == "deploy":
            return _deploy(target, options.plan)
        return _roll_back(options.what, target, options.version)
    except LarderError as error:
        print(f"error ({error.type}): {error}", file=sys.stderr)
        return 1
    except psycopg.Error as error:
        print(f"error (database): {' '.join(str(error).split())}; check DATABASE_URL", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        words = f"what was finished stays: `make {options.command}` goes on from there"
        if options.command == "deploy":
            words += "; a version that answers a share of the requests keeps it until then, `make rollback WHAT=function` takes it back"
        print(f"\ninterrupted; {words}", file=sys.stderr)
        return 130
    finally:
        telemetry.shutdown()


if __name__ == "__main__":
    sys.exit(main())
