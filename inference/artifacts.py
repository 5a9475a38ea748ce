"""Artefacts as files: below ARTIFACTS_URL (`file://` or `s3://`), fetched once, verified before use."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from inference import aws
from schemas.errors import ArtifactError, StoreUnavailable
from schemas.manifest import MANIFEST_FILE, ArtifactFile, Manifest
from schemas.urls import local_folder

MAX_FILE_BYTES = 2 << 30
BAKED = "LARDER_BAKED_ARTIFACTS"
"""Names a folder laid out as ARTIFACTS_URL that a function was packed with: what lies there need not be fetched."""
ENCODER_MANIFEST = "encoder.json"
"""What makes a folder a text encoder; see inference/encoder.py."""
_S3_CONNECT_SECONDS = 2
_S3_READ_SECONDS = 20
_S3_MISSING = frozenset({"NoSuchKey", "NoSuchBucket", "404", "NotFound"})


def sha256_of(file: Path) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(folder: Path, names: Collection[str] | None = None) -> Manifest:
    """The manifest of the artefact in `folder`, after checking its files, or only `names` of them, against it.

    Raises ArtifactError, naming the file, if one is missing, changed or lies outside the folder.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise ArtifactError(f"{folder} holds no {MANIFEST_FILE}: the artefact was never finished; release again")
    manifest = Manifest.from_json(file.read_text(encoding="utf-8"))
    for name in manifest.files if names is None else names:
        verified(folder, name, manifest.files)
    return manifest


def verified(folder: Path, name: str, files: Mapping[str, ArtifactFile], *, read: bool = False) -> bytes:
    """Check that file `name` of `folder` is what `files` says; with `read` also give its content, hashed as it is given.

    Raises ArtifactError, naming the file, if it is missing, changed, unknown or lies outside the folder.
    """
    entry, path = files.get(name), folder / name
    if entry is None:
        raise ArtifactError(f"the manifest in {folder} names no {name!r}; release again")
    if Path(name).name != name:
        raise ArtifactError(f"the manifest in {folder} names {name!r}, outside its own folder; release again")
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; release again")
    size = path.stat().st_size
    content, same = b"", size == entry.size_bytes
    if same and read:
        content = path.read_bytes()
        same = hashlib.sha256(content).hexdigest() == entry.sha256
    elif same:
        same = sha256_of(path) == entry.sha256
    if not same:
        raise ArtifactError(
            f"{path} is not the file that was released ({size} bytes of {entry.size_bytes}, or its SHA-256 differs); "
            "release again"
        )
    return content


def fetch(root_url: str, path: str) -> Path:
    """A local folder with the artefact at `path` below `root_url`; fetched into a cache when it lies in S3.

    What comes from S3 is verified before it enters the cache. Raises ArtifactError if it is missing or changed,
    StoreUnavailable if S3 does not answer.
    """
    _check_path(path)
    if os.environ.get(BAKED):
        packed = Path(os.environ[BAKED]) / path
        if any((packed / name).is_file() for name in (MANIFEST_FILE, ENCODER_MANIFEST)):
            return packed
    root = local_folder(root_url)
    if root is not None:
        folder = root / path
        if not folder.is_dir():
            raise ArtifactError(f"{folder} is missing; release again, or point ARTIFACTS_URL at where it lies")
        return folder
    target = _cached(root_url, path)
    if any((target / name).is_file() for name in (MANIFEST_FILE, ENCODER_MANIFEST)):
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _download(*_s3_place(root_url, path), partial)
        _check_fetched(partial)
        # Two processes may fetch at once; the first to finish wins and the other's copy is the same.
        if not target.exists():
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def discard(root_url: str, path: str) -> bool:
    """Forget the cached copy of an artefact in S3, so that the next fetch brings it anew; False if there is none."""
    _check_path(path)
    if local_folder(root_url) is not None or not _cached(root_url, path).exists():
        return False
    shutil.rmtree(_cached(root_url, path), ignore_errors=True)
    return True


def _check_path(path: str) -> None:
    if ".." in Path(path).parts or path.startswith("/"):
        raise ArtifactError(f"artefact path {path!r} leaves the artefacts' root; refuse it")


def _cached(root_url: str, path: str) -> Path:
    # A folder of this user's own: what others put into the temporary directory is none of ours.
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    cache = Path(tempfile.gettempdir()) / f"larder-artifacts-{owner}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and (cache.is_symlink() or cache.stat().st_uid != owner):
        raise ArtifactError(f"{cache} belongs to somebody else; remove it, or set TMPDIR")
    return cache / hashlib.sha256(root_url.encode()).hexdigest()[:12] / path


def _check_fetched(folder: Path) -> None:
    if (folder / MANIFEST_FILE).is_file():
        verify(folder)
    elif (folder / ENCODER_MANIFEST).is_file():
        for name in (files := encoder_files(folder)):
            verified(folder, name, files)


def encoder_files(folder: Path) -> dict[str, ArtifactFile]:
    """What the manifest of the text encoder in `folder` says of its files. Raises ArtifactError if it is not one of ours."""
    try:
        raw = json.loads((folder / ENCODER_MANIFEST).read_text(encoding="utf-8"))
        return {name: ArtifactFile(**entry) for name, entry in raw["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / ENCODER_MANIFEST} is missing or not an encoder's manifest ({error}); export the encoder again"
        ) from error


def publish(root_url: str, path: str, folder: Path) -> None:
    """Put the files of `folder` at `path` below `root_url`; an artefact that is there already stays as it is."""
    root = local_folder(root_url)
    if root is not None:
        target = root / path
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        for file in folder.iterdir():
            shutil.copy2(file, partial / file.name)
        partial.chmod(0o755)
        os.replace(partial, target)
        return
    bucket, prefix = _s3_place(root_url, path)
    with _s3(f"s3://{bucket}/{prefix}") as client:
        # The file that makes the folder an artefact goes last.
        for file in sorted(folder.iterdir(), key=lambda entry: entry.suffix == ".json"):
            client.upload_file(str(file), bucket, f"{prefix}/{file.name}")


def _s3_place(root_url: str, path: str) -> tuple[str, str]:
    parts = urlsplit(root_url)
    return parts.netloc, f"{parts.path.strip('/')}/{path}".strip("/")


@contextmanager
def _s3(place: str) -> Iterator[Any]:
    """A client for S3; what goes wrong with it at `place` leaves the block as ArtifactError or StoreUnavailable."""
    # Only artefacts in S3 need it.
    from boto3.exceptions import Boto3Error
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield aws.session().client(
            "s3",
            config=Config(
                connect_timeout=_S3_CONNECT_SECONDS,
                read_timeout=_S3_READ_SECONDS,
                retries={"mode": "standard", "total_max_attempts": 3},
            ),
        )
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "unknown"))
        if code in _S3_MISSING:
            raise ArtifactError(
                f"{place} is missing ({code}); release again, or point ARTIFACTS_URL at where it lies"
            ) from error
        raise StoreUnavailable(
            f"S3 refused {place} ({code}); check the bucket's policy and the role's right to read it, or try again later"
        ) from error
    except (BotoCoreError, Boto3Error, OSError) as error:
        raise StoreUnavailable(
            f"{place} cannot be fetched or stored ({type(error).__name__}); check ARTIFACTS_URL, the credentials and the "
            "network, or try again later"
        ) from error


def _download(bucket: str, prefix: str, folder: Path) -> None:
    with _s3(f"s3://{bucket}/{prefix}") as client:
        listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", [])
        if not listed:
            raise ArtifactError(
                f"s3://{bucket}/{prefix} is missing; release again, or point ARTIFACTS_URL at where it lies"
            )
        for entry in listed:
            if entry["Size"] > MAX_FILE_BYTES:
                raise ArtifactError(
                    f"s3://{bucket}/{entry['Key']} has {entry['Size']} bytes; at most {MAX_FILE_BYTES} are loaded"
                )
            client.download_file(bucket, entry["Key"], str(folder / Path(entry["Key"]).name))


def put(root_url: str, path: str, content: bytes) -> None:
    """Write one small file at `path` below `root_url`, whole or not at all."""
    root = local_folder(root_url)
    if root is not None:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_bytes(content)
        os.replace(temporary, target)
        return
    bucket, key = _s3_place(root_url, path)
    with _s3(f"s3://{bucket}/{key}") as client:
        client.put_object(Bucket=bucket, Key=key, Body=content)


def get(root_url: str, path: str) -> bytes:
    """One small file at `path` below `root_url`.

    Raises ArtifactError if it is not there, StoreUnavailable if that cannot be told.
    """
    root = local_folder(root_url)
    if root is not None:
        try:
            return (root / path).read_bytes()
        except OSError as error:
            raise ArtifactError(
                f"{root_url}/{path} cannot be read ({type(error).__name__}); release a model first"
            ) from error
    bucket, key = _s3_place(root_url, path)
    with _s3(f"s3://{bucket}/{key}") as client:
        return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())
