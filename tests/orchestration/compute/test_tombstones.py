"""Tombstones: known by hash alone, found in texts, respected by whatever was read before; in S3 as on disk."""

from __future__ import annotations

import hmac
import io
import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import hypothesis.strategies as st
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import days_ago, replace_database
from hypothesis import given, settings
from test_forget import ANNA, NOW, world
from worlds import ListSource

from infra import postgres
from orchestration.compute import tombstones, training_set
from orchestration.compute.forget import forget
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.training_set import build_training_set
from schemas.events import Event, Item


def test_the_database_hashes_as_the_loads_do(database: str, connection: psycopg.Connection) -> None:
    connection.execute("INSERT INTO tombstones VALUES (user_hash(%s), %s, %s)", ("Åse", 3, NOW))
    stones = tombstones.read_tombstones(connection)
    assert stones.since("Åse") == NOW
    assert stones.since("ase") is None


def test_two_databases_hash_one_person_differently(postgres_url: str) -> None:
    hashes = []
    for number in range(2):
        name = f"larder_key_{os.getpid()}_{number}"
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
            try:
                url = replace_database(postgres_url, name)
                postgres.migrate(url)
                with psycopg.connect(url) as own:
                    hashes.append(own.execute("SELECT user_hash('anna')").fetchone())
                    with pytest.raises(psycopg.errors.UniqueViolation):
                        own.execute("INSERT INTO erasure_key (inner_pad, outer_pad) VALUES ('', '')")
            finally:
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    assert hashes[0] != hashes[1]


@settings(max_examples=200, deadline=None)
@given(user_id=st.text(min_size=1, max_size=12), before=st.text(max_size=8), after=st.text(max_size=8))
def test_a_text_names_a_person_where_the_tombstone_finds_them(user_id: str, before: str, after: str) -> None:
    key = b"k" * 64
    text = before + user_id + after
    try:
        stones = tombstones.Tombstones(
            key, {hmac.digest(key, user_id.encode(), "sha256"): NOW}, frozenset({len(user_id)})
        )
        text.encode()
    except UnicodeEncodeError:
        return
    assert stones.named_in(text) == tombstones.names(text, user_id)
    assert tombstones.names(f"{before} {user_id},{after}", user_id)


def test_ids_are_found_as_python_and_json_write_them() -> None:
    assert tombstones.names(r'{"user": "andr\u00e9 \"x\""}', 'andré "x"')
    assert tombstones.names("Event(user_id='o\\'hara')", "o'hara")
    assert not tombstones.names("user-10", "user-1")


def test_a_lake_and_artefacts_in_s3_lose_the_person_too(
    database: str, connection: psycopg.Connection, s3_bucket: str
) -> None:
    client = boto3.client("s3")
    bucket = urlsplit(s3_bucket).netloc
    buffer = io.BytesIO()
    pq.write_table(pa.table({"user_id": [ANNA]}), buffer)
    client.put_object(Bucket=bucket, Key="some/artifacts/training/training_set.parquet", Body=buffer.getvalue())
    lake = Lake(f"{s3_bucket}/some/lake")
    ingest(world(), lake, connection, now=NOW)
    connection.commit()
    days = len(lake.days(connection))
    receipt = forget(ANNA, url=database, lake=lake, artifacts_url=f"{s3_bucket}/some/artifacts")
    listed = client.list_objects_v2(Bucket=bucket)["Contents"]
    keys = [entry["Key"] for entry in listed if not entry["Key"].endswith("/")]
    assert len(keys) == days
    assert receipt.removed["files deleted"] > 10
    for key in keys:
        table = pq.read_table(io.BytesIO(client.get_object(Bucket=bucket, Key=key)["Body"].read()))
        assert ANNA not in table["user_id"].to_pylist(), key


def test_a_training_set_read_before_an_erasure_is_not_written_after_it(
    database: str, lake: Lake, tmp_path: Path, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = (tmp_path / "artifacts").as_uri()
    people = [ANNA, *(f"person-{n}" for n in range(24))]
    events = [
        Event(
            f"{user}/{n}", user, f"item-{(n * 7 + k) % 40}", "view", None, days_ago(40 - n % 40) + timedelta(minutes=k)
        )
        for k, user in enumerate(people)
        for n in range(45)
    ]
    ingest(ListSource(events, [Item(f"item-{n}", f"Item {n}") for n in range(40)]), lake, connection, now=NOW)
    connection.commit()
    build_training_set(lake, connection, artifacts)
    connection.commit()
    file = Path(artifacts.removeprefix("file://")) / training_set.PATH
    assert ANNA in pq.read_table(file)["user_id"].to_pylist()
    choose = training_set.recent_rows

    def choose_then_forget(*given: Any) -> Any:
        forget(ANNA, url=database, lake=lake, artifacts_url=artifacts)
        return choose(*given)

    monkeypatch.setattr(training_set, "recent_rows", choose_then_forget)
    with pytest.raises(tombstones.Overtaken, match="run it again"):
        build_training_set(lake, connection, artifacts)
    assert not file.exists()
    connection.rollback()
    monkeypatch.setattr(training_set, "recent_rows", choose)
    assert build_training_set(lake, connection, artifacts).people == 24
