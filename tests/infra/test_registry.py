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


@pytest.mark.parametrize("made", ["passed", "failed", "unknown", "without vectors"])
def test_the_database_itself_decides_which_version_an_alias_may_name(connection: psycopg.Connection, made: str) -> None:
    """By plain SQL, whoever writes it: the table's guard does not depend on our code."""
    serving = version(connection, 1, True)
    registry.promote(connection, serving)
    name = "nobody" if made == "unknown" else version(connection, 2, made != "failed")
    if made == "without vectors":
        connection.execute("INSERT INTO items (item_id, title) VALUES ('a', 'A')")
        connection.execute(
            "INSERT INTO text_vectors (item_id, text_hash, vector) VALUES ('a', 'h', array_fill(0.1, ARRAY[384])::vector)"
        )
    connection.commit()
    for sql in (
        "UPDATE model_aliases SET version = %s, revision = revision + 1",
        "INSERT INTO model_aliases (alias, version) VALUES ('canary', %s)",
    ):
        if made == "passed":
            connection.execute(sql, (name,))
        else:
            words = "lacks vectors for 1 items" if made == "without vectors" else "no passed gate record"
            with pytest.raises(psycopg.errors.CheckViolation, match=words):
                connection.execute(sql, (name,))
        connection.rollback()


def test_an_alias_moves_one_revision_at_a_time(connection: psycopg.Connection) -> None:
    first, second = version(connection, 1, True), version(connection, 2, True)
    registry.promote(connection, first)
    connection.commit()
    for revision in ("revision", "revision + 2", "1"):
        with pytest.raises(psycopg.errors.CheckViolation, match="another release came in between"):
            connection.execute(f"UPDATE model_aliases SET version = %s, revision = {revision}", (second,))
        connection.rollback()


@pytest.mark.parametrize("table", ["model_versions", "gate_records"])
def test_what_was_built_and_judged_stays_as_it_was_written(connection: psycopg.Connection, table: str) -> None:
    version(connection, 1, False)
    change = {"model_versions": "path = 'elsewhere'", "gate_records": "passed = true"}[table]
    for sql in (f"UPDATE {table} SET {change}", f"DELETE FROM {table}", f"TRUNCATE {table} CASCADE"):
        with pytest.raises(
            psycopg.errors.RestrictViolation, match="is refused: its rows are what was built and judged"
        ):
            connection.execute(sql)
        connection.rollback()
