"""Functions of the database that run with their owner's rights: the few things that a role may do beyond reading.

    accept_events         store posted events; its tiles follow the declared views, so it is made anew when those change
    log_served            keep feature vectors as they were served
    log_served_requests   keep what was shown, and what shadows would have shown
    accept_survey         keep answers to the page's two questions
    request_erasure       ask for a person to be forgotten
    set_consent           keep what a person said to being personalised
    without_consent       who of a few people is not personalised
    request_export        ask for all that is held of a person
    read_export           read an export that was made
    api_key               look one request key up by its id
    note_catalogue_change  what the triggers of schemas/catalogue_sql.py run

Plain rights would not do: an INSERT with ON CONFLICT also needs to read, and who may read or write the tables could do
far more than this. Their text lies in schemas/sql/.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

from schemas import online_sql
from schemas.ranker import MAX_HISTORY

SERVED_KEPT_DAYS = 9
"""How long vectors as served are kept for the skew audit and the drift report: a whole week, and a day to be late with it."""
SERVED_REQUESTS_KEPT_DAYS = 90
"""How long is kept what was shown: an experiment's weeks, and what is judged by its log afterwards."""


@dataclass(frozen=True, slots=True)
class Function:
    """A function `name(arguments)`; `create` makes or replaces it."""

    name: str
    arguments: str
    returns: str
    body: str
    volatility: str = "VOLATILE"

    @property
    def signature(self) -> str:
        return f"public.{self.name}({self.arguments})"

    @property
    def create(self) -> str:
        # Names are looked up where they are meant, whatever path the caller has set; temporary tables come last.
        return (
            f"CREATE OR REPLACE FUNCTION {self.signature} RETURNS {self.returns} LANGUAGE plpgsql {self.volatility} "
            # In the bodies a name is a column: parameters are only ever called by their number.
            f"SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $body$#variable_conflict use_column\n"
            f"{self.body}$body$"
        )


@cache
def accept_events() -> Function:
    """`accept_events(events)`: gives the ids that were new."""
    since = f"date_trunc('day', now(), 'UTC') - INTERVAL '{online_sql.KEPT_DAYS} days'"
    body = _body("accept_events").format(tiles=online_sql.tile_steps_sql("stored", since), history=MAX_HISTORY)
    return Function("accept_events", "jsonb", "SETOF text", body)


@cache
def fixed() -> tuple[Function, ...]:
    """The functions that do not depend on the declared views."""
    log_served = _body("log_served").format(erasure_lock=online_sql.ERASURE_LOCK, kept_days=SERVED_KEPT_DAYS)
    log_requests = _body("log_served_requests").format(
        erasure_lock=online_sql.ERASURE_LOCK, kept_days=SERVED_REQUESTS_KEPT_DAYS
    )
    key = "TABLE (secret_hash bytea, scopes text[], per_minute integer, expires_at timestamptz, revoked_at timestamptz)"
    return (
        Function("log_served", "jsonb", "integer", log_served),
        Function("log_served_requests", "jsonb", "integer", log_requests),
        Function(
            "accept_survey", "jsonb", "integer", _body("accept_survey").format(erasure_lock=online_sql.ERASURE_LOCK)
        ),
        Function("request_erasure", "text, text", "text", _body("request_erasure")),
        Function("set_consent", "text, boolean", "timestamptz", _body("set_consent")),
        Function("without_consent", "jsonb, boolean", "SETOF text", _body("without_consent"), "STABLE"),
        Function("request_export", "text, text", "jsonb", _body("request_export")),
        Function(
            "read_export", "text, text", "TABLE (document jsonb, ready_at timestamptz)", _body("read_export"), "STABLE"
        ),
        Function("api_key", "text", key, _body("api_key"), "STABLE"),
        Function("note_catalogue_change", "", "trigger", _body("note_catalogue_change")),
    )


def _body(name: str) -> str:
    return (resources.files("schemas") / "sql" / f"{name}.sql").read_text(encoding="utf-8")
