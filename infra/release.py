"""What is released, and how it gets to where a function reads it: the champion's files, the encoder, the pointer."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from inference import artifacts
from infra import package, registry
from schemas.errors import ArtifactError, DeployError
from schemas.manifest import CHAMPION_POINTER, ENCODER_PATH, MANIFEST_FILE

Progress = Callable[[str], None]
_HASH = "larder-sha256"


@dataclass(frozen=True, slots=True)
class Release:
    """The champion: its version, where its files lie below `artifacts_url`, and when its alias was moved there."""

    version: str
    path: str
    revision: int
    artifacts_url: str


def read(connection: psycopg.Connection[Any], artifacts_url: str) -> Release:
    """What serves now. Raises DeployError if nothing was released yet."""
    alias = registry.read_alias(connection)
    row = (
        alias and connection.execute("SELECT path FROM model_versions WHERE version = %s", (alias.version,)).fetchone()
    )
    if alias is None or not row:
        raise DeployError(
            "no model is released yet, and a function without one would answer from the floor for ever; "
            "`make run` trains and releases one if it passes its gate"
        )
    return Release(alias.version, row[0], alias.revision, artifacts_url)


@contextmanager
def gathered(release: Release) -> Iterator[Path]:
    """A folder laid out as ARTIFACTS_URL with what a function reads of `release`, every file verified.

    Raises ArtifactError if a file is missing or changed.
    """
    model = artifacts.fetch(release.artifacts_url, release.path)
    artifacts.verify(model)
    try:
        encoder: Path | None = artifacts.fetch(release.artifacts_url, ENCODER_PATH)
    except ArtifactError:
        encoder = None  # wishes are then answered without one, as everywhere
    folder = Path(tempfile.mkdtemp(prefix="larder-release-"))
    try:
        package.gather(folder, release.path, model, encoder)
        pointer = json.dumps({"version": release.version, "path": release.path})
        (folder / CHAMPION_POINTER).write_text(pointer, encoding="utf-8")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Pushed:
    """One file on its way to S3; `there` if it lies there already."""

    file: Path
    key: str
    size_bytes: int
    there: bool


def missing(client: Any, folder: Path, bucket: str, prefix: str) -> list[Pushed]:
    """Every file of `folder` with its key below `prefix`, manifests last: what makes a folder an artefact comes last."""
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=_order)
    return [_look(client, file, bucket, f"{prefix}/{file.relative_to(folder).as_posix()}") for file in files]


def push(client: Any, files: list[Pushed], bucket: str) -> int:
    """Upload those of `files` that are not there; how many were uploaded. A repeat goes on where this stopped."""
    waiting = [file for file in files if not file.there]
    for one in waiting:
        client.upload_file(
            str(one.file), bucket, one.key, ExtraArgs={"Metadata": {_HASH: artifacts.sha256_of(one.file)}}
        )
    return len(waiting)


def _order(file: Path) -> tuple[int, str]:
    last = {MANIFEST_FILE: 1, "encoder.json": 1, Path(CHAMPION_POINTER).name: 2}
    return last.get(file.name, 0), str(file)


def _look(client: Any, file: Path, bucket: str, key: str) -> Pushed:
    size = file.stat().st_size
    found = head(client, bucket, key)
    if found is None or found["ContentLength"] != size:
        return Pushed(file, key, size, there=False)
    recorded = found["Metadata"].get(_HASH)
    # What somebody else put there carries no hash of ours; it is written over once, with one.
    return Pushed(file, key, size, there=recorded == artifacts.sha256_of(file))


def head(client: Any, bucket: str, key: str) -> dict[str, Any] | None:
    """What S3 says of an object, or None if it is not there. Raises DeployError if the bucket is not."""
    from botocore.exceptions import ClientError

    try:
        return dict(client.head_object(Bucket=bucket, Key=key))
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchKey", "NotFound"):
            raise
    try:
        client.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "NoSuchBucket", "NotFound"):
            raise DeployError(
                f"there is no bucket {bucket}; create it (aws s3 mb s3://{bucket}), or name another in LARDER_DEPLOY_URL"
            ) from error
        raise
    return None
