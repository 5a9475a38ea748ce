"""What a person, or somebody for them, may ask about themselves: their history, to be forgotten, and how far that is."""

from __future__ import annotations

import secrets
from typing import Literal

from inference.sql_files import statement
from inference.store import Store
from schemas.errors import RequestError
from schemas.serving import ErasureResponse, HistoryResponse, PeopleResponse, PersonEvent

PEOPLE_SHOWN = 12


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
