"""What a deployment has on record about its duties and its wordings, in numbers: nothing here names anybody."""

from __future__ import annotations

import json
from typing import Any

import psycopg

from schemas.consent import SETTING, consent_default
from schemas.prompts import DEFAULTS

Connection = psycopg.Connection[Any]


def receipts(connection: Connection) -> str:
    """Erasures with what each removed, what waits, and how many said what to being personalised."""
    lines = [
        "# What people asked for",
        "",
        "## Erasures",
        "",
        "A receipt is kept for good and names nobody: what was removed, from where, and when nothing of it was left.",
        "",
        "| receipt | forgotten | finished | removed | partitions to rebuild |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = connection.execute(
        "SELECT receipt_id, forgotten_at, finished_at, removed, stale FROM erasure_receipts ORDER BY forgotten_at, receipt_id"
    ).fetchall()
    for receipt_id, forgotten_at, finished_at, removed, stale in rows:
        finished = f"{finished_at:%Y-%m-%d %H:%M}" if finished_at else "**files wait to be deleted**"
        lines.append(
            f"| {receipt_id} | {forgotten_at:%Y-%m-%d %H:%M} | {finished} | {_counts(removed)} | {_counts(stale)} |"
        )
    if not rows:
        lines[-2:] = ["There has been none."]
    waiting = _one(connection, "SELECT count(*), min(requested_at) FROM erasure_requests")
    exports = _one(connection, "SELECT count(*), count(*) FILTER (WHERE ready_at IS NULL) FROM exports")
    said = _one(
        connection, "SELECT count(*) FILTER (WHERE personalise), count(*) FILTER (WHERE NOT personalise) FROM consents"
    )
    tombstones = _one(connection, "SELECT count(*) FROM tombstones")
    since = f", the oldest since {waiting[1]:%Y-%m-%d %H:%M} UTC" if waiting[0] else ""
    lines += [
        "",
        f"{waiting[0]:,} wait to be fulfilled{since}. {tombstones[0]:,} tombstones keep old events from coming back.",
        "",
        "## Exports",
        "",
        f"{exports[0]:,} are held or wait, {exports[1]:,} of them not made yet.",
        "",
        "## Consent to being personalised",
        "",
        f"{said[0]:,} agreed, {said[1]:,} refused. Who has said nothing counts as: "
        f"{'agrees' if consent_default() else 'refuses'} (`{SETTING}` where this was written).",
        "",
    ]
    return "\n".join(lines)


def prompts(connection: Connection) -> str:
    """The wording of each kind that is used, with the figures that decided."""
    rows = connection.execute(
        "SELECT w.kind, w.version, w.chosen_at, e.figures, e.evaluated_at FROM prompt_winners AS w "
        "JOIN prompt_evaluations AS e USING (evaluation_id) ORDER BY w.kind"
    ).fetchall()
    parts = ["# Prompt templates in use"]
    for kind, version, chosen_at, figures, evaluated_at in rows:
        shown = json.dumps(figures, indent=1, sort_keys=True, ensure_ascii=False)
        parts.append(
            f"## {kind}: {version}\n\nChosen {chosen_at:%Y-%m-%d %H:%M} UTC by what was measured "
            f"{evaluated_at:%Y-%m-%d %H:%M} UTC:\n\n```json\n{shown}\n```"
        )
    for kind in sorted(set(DEFAULTS) - {row[0] for row in rows}):
        parts.append(f"## {kind}: {DEFAULTS[kind]}\n\nThe default: no evaluation has chosen another.")
    by = connection.execute("SELECT written_by, count(*) FROM item_enrichments GROUP BY 1 ORDER BY 1").fetchall()
    said = [f"- {items:,} items by {writer} (template and model)" for writer, items in by]
    parts.append(
        "## Words about items by a language model\n\n" + ("\n".join(said) or "None: no language model was used.")
    )
    return "\n\n".join(parts) + "\n"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{place} {rows:,}" for place, rows in sorted(counts.items())) or "–"


def _one(connection: Connection, sql: str) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = connection.execute(sql.encode()).fetchone()
    assert row is not None
    return row
