"""The four SQL roles and what each may do, as one declaration; infra/roles.py makes the database follow it.

    larder_owner          owns the tables; migrations are made by its members
    larder_orchestrator   what Dagster's assets need: reads and writes data, makes the tables of views and partitions
    larder_function       reads what a request reads, and nothing else
    larder_writer         calls its functions of schemas/functions.py, and nothing else

A table that is added later is the owner's and the orchestrator's alone until it is named here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from schemas import online_sql
from schemas.features import FeatureView
from schemas.views import VIEWS

OWNER, ORCHESTRATOR = "larder_owner", "larder_orchestrator"
FUNCTION, WRITER = "larder_function", "larder_writer"
ROLES = (OWNER, ORCHESTRATOR, FUNCTION, WRITER)

LOGIN = {OWNER: False, ORCHESTRATOR: True, FUNCTION: True, WRITER: True}
"""The owner is nobody: people who migrate are its members, and keep names of their own."""

SETTINGS: dict[str, dict[str, str]] = {
    FUNCTION: {
        "default_transaction_read_only": "on",
        "statement_timeout": "5s",
        "idle_in_transaction_session_timeout": "10s",
    },
    WRITER: {"statement_timeout": "10s", "idle_in_transaction_session_timeout": "10s"},
}
"""What holds in their sessions unless a request sets its own timeout."""

ALL: tuple[str, ...] = ()
"""All columns of a table."""

READS: dict[str, tuple[str, ...]] = {
    "public.model_aliases": ("alias", "version", "revision"),
    "public.model_versions": ("version", "path", "created_at"),
    # A version that an experiment names is loaded only if it passed.
    "public.gate_records": ("version", "passed"),
    "public.prompt_winners": ("kind", "version"),
    "public.user_history": ALL,
    "public.recent_events": (
        "user_id",
        "item_id",
        "event_id",
        "kind",
        "value",
        "occurred_at",
        "known_at",
        "request_id",
    ),
    "public.items": ("item_id", "title", "categories", "attributes", "available_at"),
    # Whether the items that a process keeps in memory are still what the tables say.
    "public.catalogue_changes": ("change_id",),
    "public.text_vectors": ("item_id", "vector"),
    "public.item_vectors": ("model_version", "item_id", "vector"),
    "public.co_visitation": ALL,
    "public.popular_items": ALL,
    # What everybody's list was when it was scored ahead: the rung below the ranker.
    "public.user_scores": ("user_id", "model_version", "scored_at", "item_ids", "scores"),
    "public.feature_ledger": ("view", "partition_date", "definition_hash"),
    # Who asked to be forgotten reads as unknown; a receipt names nobody.
    "public.erasure_requests": ("request_id", "user_id"),
    # Where the rule "not again" is set: what was shown to a person lately.
    "public.served_requests": ("request_id", "user_id", "served_at", "item_ids"),
    # Who answered the survey this week is not asked again; what they answered no request reads.
    "public.survey_answers": ("user_id", "answered_at"),
    # Who has not agreed to being personalised is answered without anything of theirs.
    "public.consents": ("user_id", "personalise"),
    "public.erasure_receipts": ("receipt_id", "forgotten_at", "removed", "finished_at"),
}
"""What a request reads, by table: its columns."""

EXECUTES: dict[str, str] = {
    "accept_events": WRITER,
    "log_served": WRITER,
    "log_served_requests": WRITER,
    "request_erasure": WRITER,
    "accept_survey": WRITER,
    "set_consent": WRITER,
    "without_consent": WRITER,
    "request_export": WRITER,
    "read_export": FUNCTION,
    "api_key": FUNCTION,
    "note_catalogue_change": ORCHESTRATOR,
}
"""Who may call which function; nobody else may."""

ORCHESTRATOR_OWNS = ("public.recent_events", "public.item_vectors")
"""Tables whose partitions come and go with the data: only a table's owner may add one. With them go schemas `features`
and `online` and what is in them."""

ORCHESTRATOR_RIGHTS: Mapping[str, str] = {
    "public.alembic_version": "SELECT",
    "public.deployment": "SELECT, INSERT",
    "public.erasure_key": "SELECT",
    "public.model_versions": "SELECT, INSERT",
    "public.gate_records": "SELECT, INSERT",
    # Who has keys is no business of a data pipeline.
    "public.api_keys": "",
}
"""Where the orchestrator may do less than SELECT, INSERT, UPDATE, DELETE."""

SCHEMAS = ("public", "features", "online")


def view_reads(views: Iterable[FeatureView] = VIEWS) -> dict[str, tuple[str, ...]]:
    """The tables of the declared views, which a request reads whole."""
    views = tuple(views)
    tables = [f"features.{view.name}" for view in views]
    for entity in online_sql.entities(views):
        tables += [online_sql.rows_table(entity), online_sql.tiles_table(entity)]
    return dict.fromkeys(tables, ALL)
