"""Events from an SQS queue: every message of a batch is stored or handed back to the queue, none is lost.

A message's body is what `POST /events` takes, or one such event alone. The answer names the messages that failed
(`batchItemFailures`, to be switched on in the event source mapping as ReportBatchItemFailures): the queue delivers those
again, and moves them to its dead-letter queue when it has tried often enough. An event that was stored before counts as a
repeat, so a message may come any number of times and in any order.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from inference import telemetry
from inference.connections import StatementFailed
from inference.propagation import of_messages
from inference.routes import Application
from schemas.errors import LarderError, RequestError, Unavailable
from schemas.json_body import parse
from schemas.serving import MAX_EVENTS, EventsRequest, PostedEvent

logger = logging.getLogger(__name__)

SOURCE = "aws:sqs"


@dataclass(frozen=True, slots=True)
class _Message:
    id: str
    events: tuple[PostedEvent, ...]


def is_batch(event: object) -> bool:
    """Whether an invocation's `event` is a batch of messages."""
    return isinstance(event, dict) and isinstance(event.get("Records"), list)


def all_failed(event: dict[str, Any]) -> dict[str, Any]:
    """The answer that hands the whole batch back."""
    return _failures([record["messageId"] for record in _records(event)])


def answer_batch(app: Application, event: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Store the events of a batch; which messages are to be delivered again.

    `deadline` is an instant of `time.monotonic()`: what could not be stored by then is handed back. Raises RequestError
    for records of another source, so that the invocation fails and its sender learns of it.
    """
    records = _records(event)
    failed: list[str] = []
    attributes: dict[str, telemetry.Value] = {
        "messaging.system": "aws_sqs",
        "messaging.operation.type": "process",
        "messaging.batch.message_count": len(records),
    }
    with telemetry.batch_span("events from queue", of_messages(records), attributes) as span:
        messages: list[_Message] = []
        for record in records:
            try:
                messages.append(_Message(record["messageId"], _events(record)))
            except RequestError as error:
                # What is wrong with it may quote a person: the queue holds the message, the log only says which.
                logger.warning("message %s cannot be read: %s", record["messageId"], _where(error))
                failed.append(record["messageId"])
        for group in _groups(messages):
            failed += _store(app, group, deadline)
        span.set("recsys.messages.failed", len(failed))
        if failed:
            span.fail("batch_item_failures")
    return _failures(failed)


def _store(app: Application, group: Sequence[_Message], deadline: float) -> list[str]:
    """Ids of the messages of `group` that were not stored."""
    ids = [message.id for message in group]
    if time.monotonic() >= deadline:
        return ids
    try:
        answer = app.accept_events(
            EventsRequest(events=tuple(event for message in group for event in message.events)), deadline, {}
        )
    except Exception as error:  # noqa: BLE001 - the edge: whatever it was, the messages must not be lost
        reason = error.type if isinstance(error, LarderError) else type(error).__name__
        outage = isinstance(error, Unavailable) and not isinstance(error, StatementFailed)
        if outage or len(group) == 1:
            logger.warning("%d messages were not stored and go back to the queue: %s", len(group), reason)
            return ids
        # One that the database refuses must not take the others with it.
        return [failed for message in group for failed in _store(app, [message], deadline)]
    outcomes = iter(answer.outcomes)
    refused = [message.id for message in group if "refused" in [next(outcomes).outcome for _ in message.events]]
    if refused:
        logger.warning("%d messages hold events from the future and go back to the queue", len(refused))
    return refused


def _groups(messages: Sequence[_Message]) -> list[list[_Message]]:
    """Messages together, as many as one request may hold events."""
    groups: list[list[_Message]] = []
    room = 0
    for message in messages:
        if len(message.events) > room:
            groups.append([])
            room = MAX_EVENTS
        groups[-1].append(message)
        room -= len(message.events)
    return groups


def _records(event: dict[str, Any]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = event["Records"]
    for record in records:
        source = record.get("eventSource", record.get("EventSource", "none")) if isinstance(record, dict) else "none"
        if source != SOURCE:
            raise RequestError(
                f"records of {source!r} are not taken; connect the function to an SQS queue ({SOURCE!r})", status=400
            )
    return records


def _events(record: dict[str, Any]) -> tuple[PostedEvent, ...]:
    body = record.get("body")
    raw = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else b""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):  # nested deeper than Python goes: no message may take its batch with it
        document = None
    if isinstance(document, dict) and "events" not in document:
        raw = b'{"events":[' + raw + b"]}"
    events = parse(EventsRequest, raw).events
    sent_at = _sent_at(record)
    # An event without an instant happened when it was sent, however long the queue held it.
    return tuple(
        event if event.occurred_at or sent_at is None else event.model_copy(update={"occurred_at": sent_at})
        for event in events
    )


def _sent_at(record: dict[str, Any]) -> datetime | None:
    try:
        return datetime.fromtimestamp(int(record["attributes"]["SentTimestamp"]) / 1_000, UTC)
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return None


def _where(error: RequestError) -> str:
    return f"{error.type} ({error.status}){f' at {error.field}' if error.field else ''}"


def _failures(ids: Sequence[str]) -> dict[str, Any]:
    return {"batchItemFailures": [{"itemIdentifier": message_id} for message_id in ids]}
