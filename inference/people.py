"""What a person, or somebody for them, may ask about themselves: their history, a copy of all, to be forgotten or not personalised."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from typing import Literal

from inference.sql_files import statement
from inference.store import Store
from schemas.errors import RequestError
from schemas.serving_people import (
    ConsentResponse,
    ErasureResponse,
    ExportResponse,
    HistoryResponse,
    PeopleResponse,
    PersonEvent,
)

PEOPLE_SHOWN = 12
NOT_AT_ONCE = (
    "the lake: events of more than the last days",
    "what was computed from the events: daily features, their packed rows, ids of events, training sets",
    "rows of the quarantine that name the person",
)
"""What an export that Dagster has not made yet lacks."""
DECLINED = "this person has not agreed to being personalised, so nothing they do is kept; POST /people/{user_id}/consent changes it"
"""What is said of an event that was not stored for that."""


def request_erasure(writer: Store, user_id: str, timeout_ms: float) -> ErasureResponse:
    """Ask for `user_id` to be forgotten: they read as unknown from now on, Dagster's job `forget_person` does the rest.

    Asking again gives the same receipt. Raises RequestError (404) if the database holds nothing of them.
    """
    ((receipt_id,),) = writer.call("request_erasure", [user_id, secrets.token_hex(16)], timeout_ms)
    if receipt_id is None:
        raise RequestError("nothing is held of this person; look at the id", status=404, field="user_id")
    return ErasureResponse(receipt_id=receipt_id, state="waiting")


def read_erasure(store: Store, user_id: str, receipt_id: str, timeout_ms: float) -> ErasureResponse:
    """How far an erasure is. Raises RequestError (404) if there is no such receipt, nor such a request of `user_id`."""
    parameters = {"user_id": user_id, "receipt_id": receipt_id}
    ((waits, forgotten_at, removed, finished_at),) = store.rows(statement("read_receipt"), parameters, timeout_ms)
    if forgotten_at is None and not waits:
        raise RequestError("there is no such receipt for this person", status=404, field="receipt_id")
    state: Literal["waiting", "erased", "finished"] = "finished" if finished_at else "erased"
    if forgotten_at is None:
        return ErasureResponse(receipt_id=receipt_id, state="waiting")
    return ErasureResponse(receipt_id=receipt_id, state=state, forgotten_at=forgotten_at, removed=removed)


def read_history(store: Store, user_id: str, limit: int, timeout_ms: float) -> HistoryResponse:
    """The newest `limit` events of `user_id` with titles; none of somebody unknown, or who asked to be forgotten."""
    rows = store.rows(statement("read_events"), {"user_id": user_id, "limit": limit}, timeout_ms)
    return HistoryResponse(
        events=tuple(
            PersonEvent(item_id=item_id, title=title, kind=kind, value=value, occurred_at=occurred_at)
            for item_id, title, kind, value, occurred_at in rows
        )
    )


def some_people(store: Store, timeout_ms: float) -> PeopleResponse:
    """A few ids to try the page with; whoever calls this has made sure that the asker may see them."""
    rows = store.rows(statement("some_people"), {"limit": PEOPLE_SHOWN}, timeout_ms)
    return PeopleResponse(people=tuple(user_id for (user_id,) in rows))


def set_consent(writer: Store, user_id: str, personalise: bool, timeout_ms: float) -> ConsentResponse:
    """Keep what `user_id` says to being personalised; it holds for the next request, also of somebody unknown so far."""
    ((since,),) = writer.call("set_consent", [user_id, json.dumps(personalise)], timeout_ms)
    return ConsentResponse(personalise=personalise, decided_at=since)


def without_consent(writer: Store, user_ids: Iterable[str], unless_said: bool, timeout_ms: float) -> set[str]:
    """Who of `user_ids` is not personalised; `unless_said` holds for those who have said nothing."""
    arguments = [json.dumps(sorted(set(user_ids))), json.dumps(unless_said)]
    return {user_id for (user_id,) in writer.call("without_consent", arguments, timeout_ms)}


def request_export(writer: Store, user_id: str, timeout_ms: float) -> ExportResponse:
    """What lies under `user_id` in the database's own tables, and the receipt of the whole, which Dagster makes.

    Raises RequestError (404) if the database holds nothing of them.
    """
    ((found,),) = writer.call("request_export", [user_id, secrets.token_hex(16)], timeout_ms)
    if found is None:
        raise RequestError("nothing is held of this person; look at the id", status=404, field="user_id")
    return ExportResponse(receipt_id=found["receipt_id"], state="waiting", held=found["held"], not_included=NOT_AT_ONCE)


def read_export(store: Store, user_id: str, receipt_id: str, timeout_ms: float) -> ExportResponse:
    """The export of that receipt, empty while it waits. Raises RequestError (404) if `user_id` has no such receipt."""
    rows = store.call("read_export", [user_id, receipt_id], timeout_ms)
    if not rows:
        raise RequestError("there is no such receipt for this person", status=404, field="receipt_id")
    document, ready_at = rows[0]
    if document is None:
        return ExportResponse(receipt_id=receipt_id, state="waiting", held={}, not_included=NOT_AT_ONCE)
    return ExportResponse(
        receipt_id=receipt_id,
        state="ready",
        ready_at=ready_at,
        held=document["held"],
        not_included=tuple(document["not_included"]),
    )
