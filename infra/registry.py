"""Which models exist, which passed, which one serves: registration, the gate record, promotion, rollback.

Plain functions on a connection; Dagster's assets and the commands call the same ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import psycopg

from schemas.errors import GateError
from schemas.manifest import Manifest

CHAMPION = "champion"


@dataclass(frozen=True, slots=True)
class Alias:
    """Where an alias points; `revision` grows by one with every move."""

    version: str
    revision: int


def register(connection: psycopg.Connection[Any], manifest: Manifest, path: str) -> None:
    """Record an artefact that lies at `path` below ARTIFACTS_URL; a version that is known stays as it is."""
    connection.execute(
        "INSERT INTO model_versions (version, name, path, manifest) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
        (manifest.version, manifest.name, path, manifest.to_json()),
    )


def record_gate(connection: psycopg.Connection[Any], version: str, passed: bool, record: dict[str, Any]) -> None:
    """Record what `version` had to prove. A verdict, once recorded, stands."""
    connection.execute(
        "INSERT INTO gate_records (version, passed, record) VALUES (%s, %s, %s) ON CONFLICT (version) DO NOTHING",
        (version, passed, json.dumps(record)),
    )


def read_alias(connection: psycopg.Connection[Any], alias: str = CHAMPION) -> Alias | None:
    """Where `alias` points, or None while nothing was promoted."""
    row = connection.execute("SELECT version, revision FROM model_aliases WHERE alias = %s", (alias,)).fetchone()
    return Alias(*row) if row else None


def released_before(connection: psycopg.Connection[Any], version: str) -> str | None:
    """The newest version that passed its gate and is older than `version`, or None."""
    row = connection.execute(
        "SELECT m.version FROM model_versions AS m JOIN gate_records AS g USING (version) WHERE g.passed AND m.created_at < "
        "(SELECT created_at FROM model_versions WHERE version = %s) ORDER BY m.created_at DESC LIMIT 1",
        (version,),
    ).fetchone()
    return str(row[0]) if row else None


def promote(connection: psycopg.Connection[Any], version: str, alias: str = CHAMPION) -> Alias:
    """Point `alias` at `version` by compare-and-set; promoting what already serves changes nothing.

    Raises GateError if the version has no passed gate record, lacks item vectors, or another release came first.
    """
    before = read_alias(connection, alias)
    if before is not None and before.version == version:
        return before
    try:
        with connection.transaction():
            if before is None:
                moved = connection.execute(
                    "INSERT INTO model_aliases (alias, version) VALUES (%s, %s) ON CONFLICT DO NOTHING RETURNING revision",
                    (alias, version),
                ).fetchone()
            else:
                moved = connection.execute(
                    "UPDATE model_aliases SET version = %s, revision = revision + 1, updated_at = now() "
                    "WHERE alias = %s AND revision = %s RETURNING revision",
                    (version, alias, before.revision),
                ).fetchone()
    except psycopg.errors.CheckViolation as error:
        # The database decides, whoever asks: a trigger of schemas/migrations, with words for people.
        raise GateError(error.diag.message_primary or f"the database refuses to let version {version} serve") from error
    if moved is None:
        raise GateError(
            f"another release moved {alias} while version {version} was being released; look, then release again"
        )
    return Alias(version, moved[0])
