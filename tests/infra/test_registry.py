"""The registry: only what passed its gate serves, and the database itself says so."""

from __future__ import annotations

import psycopg
import pytest

from infra import registry
from schemas.errors import GateError
from schemas.manifest import Manifest


def manifest(seed: int) -> Manifest:
    return Manifest(
        "ranker", "small", 64, "f", (), (), "e", "item.v1", "wish.v1", "2026-01-01T00:00:00+00:00", seed, {}
    )


def version(connection: psycopg.Connection, seed: int, passed: bool | None) -> str:
    made = manifest(seed)
    registry.register(connection, made, f"models/ranker/{made.version}")
    if passed is not None:
        registry.record_gate(connection, made.version, passed, {})
    connection.commit()
    return made.version


def test_promotion_moves_the_alias_and_counts_revisions(connection: psycopg.Connection) -> None:
    first, second = version(connection, 1, True), version(connection, 2, True)
    assert registry.promote(connection, first) == registry.Alias(first, 1)
    assert registry.promote(connection, first) == registry.Alias(first, 1)
    assert registry.promote(connection, second) == registry.Alias(second, 2)
    assert registry.read_alias(connection) == registry.Alias(second, 2)


@pytest.mark.parametrize("passed", [False, None])
def test_a_version_that_did_not_pass_is_refused_by_the_database(
    connection: psycopg.Connection, passed: bool | None
) -> None:
    with pytest.raises(GateError, match="no passed gate record"):
        registry.promote(connection, version(connection, 1, passed))
    assert registry.read_alias(connection) is None


def test_a_verdict_once_recorded_stands(connection: psycopg.Connection) -> None:
    name = version(connection, 1, False)
    registry.record_gate(connection, name, True, {})
    with pytest.raises(GateError):
        registry.promote(connection, name)


def test_a_version_without_complete_item_vectors_is_refused(connection: psycopg.Connection) -> None:
    connection.execute("INSERT INTO items (item_id, title) VALUES ('a', 'A')")
    connection.execute(
        "INSERT INTO text_vectors (item_id, text_hash, vector) VALUES ('a', 'h', array_fill(0.1, ARRAY[384])::vector)"
    )
    with pytest.raises(GateError, match="lacks vectors for 1 items"):
        registry.promote(connection, version(connection, 1, True))
