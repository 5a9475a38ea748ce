"""Artefacts in S3: what is wrong there is said in our words, and nothing damaged or half fetched is ever used."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from released import publish_pointer, write_release

from inference import artifacts
from inference.models import LoadedModels
from inference.store import Champion
from schemas.errors import ArtifactError, StoreUnavailable, Unavailable
from schemas.manifest import CHAMPION_POINTER, POPULAR_ITEMS, RANKER_FP32


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("artifacts")
    version = write_release(root, 1)
    publish_pointer(root, version)
    return root, version


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory of this test's own, where fetched artefacts are kept."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def stored(built: tuple[Path, str], s3_bucket: str, cache: Path) -> tuple[str, str]:
    """The bucket with one release in it, and the release's path."""
    root, version = built
    path = f"models/ranker/{version}"
    artifacts.publish(s3_bucket, path, root / path)
    artifacts.put(s3_bucket, CHAMPION_POINTER, (root / CHAMPION_POINTER).read_bytes())
    return s3_bucket, path


def client() -> Any:
    import boto3

    return boto3.session.Session().client("s3")


def test_a_release_comes_whole_and_from_the_cache_the_second_time(
    stored: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, path = stored
    folder = artifacts.fetch(url, path)
    assert artifacts.verify(folder).version == path.rpartition("/")[2]
    assert folder.stat().st_uid == artifacts.os.getuid()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert artifacts.fetch(url, path) == folder


def test_what_is_not_there_is_named_and_what_cannot_be_told_is_something_else(
    stored: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, path = stored
    for ask in (lambda: artifacts.get(url, "models/none.json"), lambda: artifacts.fetch(url, "models/none")):
        with pytest.raises(ArtifactError, match=r"models/none.*is missing.*release again"):
            ask()
    with pytest.raises(ArtifactError, match="NoSuchBucket"):
        artifacts.fetch("s3://there-is-no-such-bucket-here", path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    for ask in (
        lambda: artifacts.get(url, CHAMPION_POINTER),
        lambda: artifacts.fetch(url, path),
        lambda: artifacts.put(url, "x", b""),
    ):
        with pytest.raises(StoreUnavailable, match=r"cannot be fetched or stored \(EndpointConnectionError\)"):
            ask()


def test_missing_credentials_are_said_and_no_secret_is(
    stored: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, path = stored
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(StoreUnavailable, match="NoCredentialsError"):
        artifacts.fetch(url, path)


@pytest.mark.parametrize("name", [RANKER_FP32, POPULAR_ITEMS])
def test_what_was_changed_in_the_bucket_never_enters_the_cache(stored: tuple[str, str], cache: Path, name: str) -> None:
    url, path = stored
    bucket = url.removeprefix("s3://")
    client().put_object(Bucket=bucket, Key=f"{path}/{name}", Body=b"something else")
    with pytest.raises(ArtifactError, match="is not the file that was released"):
        artifacts.fetch(url, path)
    left = [file for file in cache.rglob("*") if file.is_file()]
    assert left == []


def test_a_file_that_is_missing_in_the_bucket_is_named(stored: tuple[str, str]) -> None:
    url, path = stored
    client().delete_object(Bucket=url.removeprefix("s3://"), Key=f"{path}/{RANKER_FP32}")
    with pytest.raises(ArtifactError, match=f"{RANKER_FP32} is missing"):
        artifacts.fetch(url, path)


def test_a_copy_that_was_damaged_in_the_cache_is_fetched_anew(stored: tuple[str, str]) -> None:
    url, path = stored
    folder = artifacts.fetch(url, path)
    (folder / RANKER_FP32).write_bytes(b"a full disk left this")
    version = path.rpartition("/")[2]
    assert LoadedModels(url).first(Champion(version, 1, path), 60_000).version == version


def test_a_bucket_that_comes_back_is_found_again(stored: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    url, path = stored
    version = path.rpartition("/")[2]
    models = LoadedModels(url)
    with monkeypatch.context() as gone:
        gone.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        with pytest.raises(StoreUnavailable):
            models.first(Champion(version, 1, path), 60_000)
        with pytest.raises(Unavailable):
            models.popular(60_000)
    give_up_at = time.monotonic() + 30
    while True:
        try:
            assert models.first(Champion(version, 1, path), 10_000).version == version
            break
        except (StoreUnavailable, Unavailable):
            assert time.monotonic() < give_up_at
            time.sleep(0.1)


@pytest.fixture
def silent_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket behind a server that accepts and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                held.append(listener.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    yield "s3://silent"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for one in held:
        one.close()
    thread.join(5)


def test_a_bucket_that_never_answers_keeps_no_request_longer_than_it_can_wait(silent_bucket: str) -> None:
    models = LoadedModels(silent_bucket)
    started = time.perf_counter()
    with pytest.raises(Unavailable, match="still being loaded"):
        models.popular(200)
    with pytest.raises(Unavailable, match="still being loaded"):
        models.first(Champion("0" * 16, 1, "models/ranker/x"), 200)
    assert time.perf_counter() - started < 1.5
