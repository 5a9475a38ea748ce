"""Which version of each prompt template is used: what was measured, what won, what a model was trained with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import psycopg

from schemas import prompts


@dataclass(frozen=True, slots=True)
class PromptVersions:
    """One version of each kind."""

    item: str = prompts.DEFAULTS["item"]
    profile: str = prompts.DEFAULTS["profile"]
    wish: str = prompts.DEFAULTS["wish"]


@dataclass(frozen=True, slots=True)
class Judged:
    """One template's newest figures under some conditions."""

    evaluation_id: int
    version: str
    figures: dict[str, Any]


def read_versions(connection: psycopg.Connection[Any]) -> PromptVersions:
    """The recorded winner of each kind, the default where there is none.

    Raises DefinitionError if a winner's file is no longer there.
    """
    winners = dict(connection.execute("SELECT kind, version FROM prompt_winners").fetchall())
    chosen = {kind: winners.get(kind, version) for kind, version in prompts.DEFAULTS.items()}
    for version in chosen.values():
        prompts.load(version)
    return PromptVersions(**chosen)


def record_figures(connection: psycopg.Connection[Any], version: str, conditions: str, figures: dict[str, Any]) -> int:
    """Keep what `version` scored under `conditions`; the id of the row."""
    row = connection.execute(
        "INSERT INTO prompt_evaluations (version, kind, conditions, figures) VALUES (%s, %s, %s, %s) RETURNING evaluation_id",
        (version, prompts.load(version).kind, conditions, json.dumps(figures)),
    ).fetchone()
    assert row is not None
    return int(row[0])


def judged(connection: psycopg.Connection[Any], kind: str, conditions: str) -> list[Judged]:
    """The newest figures of each known template of `kind` under `conditions`, in the templates' order."""
    rows = connection.execute(
        "SELECT DISTINCT ON (version) evaluation_id, version, figures FROM prompt_evaluations "
        "WHERE kind = %s AND conditions = %s ORDER BY version, evaluation_id DESC",
        (kind, conditions),
    ).fetchall()
    found = {row[1]: Judged(*row) for row in rows}
    return [found[version] for version in prompts.versions(kind) if version in found]


def record_winner(connection: psycopg.Connection[Any], winner: Judged) -> bool:
    """Use `winner` from now on; False if it is used already."""
    row = connection.execute(
        "INSERT INTO prompt_winners AS w (kind, version, evaluation_id) VALUES (%s, %s, %s) "
        "ON CONFLICT (kind) DO UPDATE SET version = excluded.version, evaluation_id = excluded.evaluation_id, "
        "chosen_at = now() WHERE w.version <> excluded.version RETURNING kind",
        (prompts.load(winner.version).kind, winner.version, winner.evaluation_id),
    ).fetchone()
    return row is not None
