"""Artefacts as files: below ARTIFACTS_URL (`file://` or `s3://`), fetched once, verified before use."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from schemas.errors import ArtifactError
from schemas.manifest import MANIFEST_FILE, Manifest
from schemas.urls import local_folder

MAX_FILE_BYTES = 2 << 30
BAKED = "LARDER_BAKED_ARTIFACTS"
"""Names a folder laid out as ARTIFACTS_URL that a function was packed with: what lies there need not be fetched."""


def sha256_of(file: Path) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(folder: Path) -> Manifest:
    """The manifest of the artefact in `folder`, after checking every file against it.

    Raises ArtifactError, naming the file, if one is missing, changed or lies outside the folder.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise ArtifactError(f"{folder} holds no {MANIFEST_FILE}: the artefact was never finished; release again")
    manifest = Manifest.from_json(file.read_text(encoding="utf-8"))
    for name, entry in manifest.files.items():
        path = folder / name
        if Path(name).name != name:
            raise ArtifactError(f"the manifest in {folder} names {name!r}, outside its own folder; release again")
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; release again")
        size = path.stat().st_size
        if size != entry.size_bytes or sha256_of(path) != entry.sha256:
            raise ArtifactError(
                f"{path} is not the file that was released ({size} bytes of {entry.size_bytes}, or its SHA-256 differs); "
                "release again"
            )
    return manifest


def fetch(root_url: str, path: str) -> Path:
    """A local folder with the artefact at `path` below `root_url`; fetched into a cache when it lies in S3."""
    if ".." in Path(path).parts or path.startswith("/"):
        raise ArtifactError(f"artefact path {path!r} leaves the artefacts' root; refuse it")
    if os.environ.get(BAKED):
        packed = Path(os.environ[BAKED]) / path
        if (packed / MANIFEST_FILE).is_file() or (packed / "encoder.json").is_file():
            return packed
    root = local_folder(root_url)
    if root is not None:
        folder = root / path
        if not folder.is_dir():
            raise ArtifactError(f"{folder} is missing; release again, or point ARTIFACTS_URL at where it lies")
        return folder
    cache = Path(tempfile.gettempdir()) / "larder-artifacts" / hashlib.sha256(root_url.encode()).hexdigest()[:12]
    target = cache / path
    if (target / MANIFEST_FILE).is_file() or (target / "encoder.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _download(*_s3_place(root_url, path), partial)
        # Two processes may fetch at once; the first to finish wins and the other's copy is the same.
        if not target.exists():
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


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
    import boto3  # only artefacts in S3 need it

    client = boto3.client("s3")
    bucket, prefix = _s3_place(root_url, path)
    # The file that makes the folder an artefact goes last.
    for file in sorted(folder.iterdir(), key=lambda entry: entry.suffix == ".json"):
        client.upload_file(str(file), bucket, f"{prefix}/{file.name}")


def _s3_place(root_url: str, path: str) -> tuple[str, str]:
    parts = urlsplit(root_url)
    return parts.netloc, f"{parts.path.strip('/')}/{path}".strip("/")


def _download(bucket: str, prefix: str, folder: Path) -> None:
    import boto3  # only artefacts in S3 need it

    client = boto3.client("s3")
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
    import boto3  # only artefacts in S3 need it

    bucket, key = _s3_place(root_url, path)
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=content)


def get(root_url: str, path: str) -> bytes:
    """One small file at `path` below `root_url`. Raises ArtifactError if it is not there."""
    root = local_folder(root_url)
    try:
        if root is not None:
            return (root / path).read_bytes()
        import boto3  # only artefacts in S3 need it

        bucket, key = _s3_place(root_url, path)
        return bytes(boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read())
    except Exception as error:
        raise ArtifactError(
            f"{root_url}/{path} cannot be read ({type(error).__name__}); release a model first"
        ) from error
