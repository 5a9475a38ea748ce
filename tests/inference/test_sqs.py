"""Events from a queue: stored, repeated, handed back; under the real runtime client and on a real database."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from door_app import SmallApplication
from lambda_runtime_api import RuntimeApi, running_function

from inference.connections import StatementFailed
from inference.handlers.aws_lambda import create_handler
from inference.handlers.sqs import answer_batch
from inference.runtime import LarderApplication
from inference.settings import Settings
from schemas.errors import RequestError, Unavailable
from schemas.serving import MAX_EVENTS, EventsRequest, EventsResponse


def event(number: int | str, **more: Any) -> dict[str, Any]:
    return {"event_id": f"e{number}", "user_id": "u", "item_id": "i", "kind": "view", **more}


def message(name: str, body: object, **attributes: str) -> dict[str, Any]:
    return {
        "messageId": name,
        "body": body if isinstance(body, str) else json.dumps(body),
        "attributes": attributes,
        "messageAttributes": {},
        "eventSource": "aws:sqs",
        "eventSourceARN": "arn:aws:sqs:eu-central-1:000000000000:events",
    }


def batch(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"Records": list(messages)}


def failed(answer: Mapping[str, Any]) -> list[str]:
    assert set(answer) == {"batchItemFailures"}
    return [entry["itemIdentifier"] for entry in answer["batchItemFailures"]]


def soon() -> float:
    return time.monotonic() + 20


@pytest.fixture
def app(database: str, tmp_path: Path) -> Iterator[LarderApplication]:
    made = LarderApplication.from_settings(Settings(database, tmp_path.as_uri(), access="platform"))
    yield made
    made.close()


def stored(connection: psycopg.Connection[Any]) -> dict[str, datetime]:
    connection.rollback()
    return dict(connection.execute("SELECT event_id, occurred_at FROM recent_events").fetchall())


def test_a_batch_is_stored_and_what_cannot_be_read_goes_back_alone(
    app: LarderApplication, connection: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    answer = answer_batch(
        app,
        batch(
            message("m1", {"events": [event(1), event(2)]}),
            message("m2", event(3)),
            message("m3", "not json CANARY"),
            message("m4", event(4, kind="CANARY")),
            message("m5", {"events": [event(5), {"event_id": "CANARY"}]}),
            message("m6", event(6, user_id="u2")),
        ),
        soon(),
    )
    assert failed(answer) == ["m3", "m4", "m5"]
    assert sorted(stored(connection)) == ["e1", "e2", "e3", "e6"]
    assert "m4 cannot be read: invalid_request (422) at events.0.kind" in caplog.text
    assert "CANARY" not in caplog.text


def test_a_message_nested_deeper_than_python_goes_goes_back_alone(
    app: LarderApplication, connection: psycopg.Connection[Any]
) -> None:
    whole = batch(
        message("m1", event(1)), message("m2", "[" * 5_000), message("m3", '{"a":' * 5_000), message("m4", event(4))
    )
    assert failed(answer_batch(app, whole, soon())) == ["m2", "m3"]
    assert sorted(stored(connection)) == ["e1", "e4"]


def test_a_message_that_comes_again_changes_nothing(
    app: LarderApplication, connection: psycopg.Connection[Any]
) -> None:
    whole = batch(message("m1", event(1)), message("m2", event(1)))
    assert failed(answer_batch(app, whole, soon())) == []
    assert failed(answer_batch(app, whole, soon())) == []
    assert list(stored(connection)) == ["e1"]


def test_an_event_happened_when_it_was_sent_not_when_the_queue_let_it_go(
    app: LarderApplication, connection: psycopg.Connection[Any]
) -> None:
    sent_at = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=3)
    said_at = sent_at - timedelta(hours=1)
    milliseconds = str(int(sent_at.timestamp() * 1_000))
    whole = batch(
        message("m1", event(1), SentTimestamp=milliseconds),
        message("m2", event(2, occurred_at=said_at.isoformat()), SentTimestamp=milliseconds),
    )
    assert failed(answer_batch(app, whole, soon())) == []
    assert stored(connection) == {"e1": sent_at, "e2": said_at}


def test_an_event_from_the_future_is_handed_back_until_its_time_has_come(app: LarderApplication) -> None:
    future = (datetime.now(UTC) + timedelta(hours=2)).isoformat()
    whole = batch(message("m1", event(1)), message("m2", {"events": [event(2), event(3, occurred_at=future)]}))
    assert failed(answer_batch(app, whole, soon())) == ["m2"]


def test_an_event_of_who_does_not_agree_to_it_is_done_with_and_not_handed_back(
    app: LarderApplication, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("INSERT INTO consents (user_id, personalise) VALUES ('no', false)")
    connection.commit()
    assert failed(answer_batch(app, batch(message("m", event(1, user_id="no")), message("n", event(2))), soon())) == []
    assert list(stored(connection)) == ["e2"]


def test_more_events_than_one_request_holds_are_stored_in_several(
    app: LarderApplication, connection: psycopg.Connection[Any]
) -> None:
    whole = batch(
        *(message(f"m{n}", {"events": [event(f"{n}-{k}") for k in range(MAX_EVENTS // 2 + 1)]}) for n in range(3))
    )
    assert failed(answer_batch(app, whole, soon())) == []
    assert len(stored(connection)) == 3 * (MAX_EVENTS // 2 + 1)


def test_without_a_database_every_message_goes_back(tmp_path: Path) -> None:
    app = LarderApplication.from_settings(
        Settings("postgresql://127.0.0.1:1/none", tmp_path.as_uri(), access="platform")
    )
    whole = batch(message("m1", event(1)), message("m2", event(2)))
    assert failed(answer_batch(app, whole, soon())) == ["m1", "m2"]
    app.close()


def test_one_message_that_the_database_refuses_takes_no_other_with_it() -> None:
    class Poisoned(SmallApplication):
        def accept_events(
            self, request: EventsRequest, deadline: float | None, carrier: Mapping[str, str]
        ) -> EventsResponse:
            if any(one.event_id == "e2" for one in request.events):
                raise StatementFailed("the database refused a statement")
            return super().accept_events(request, deadline, carrier)

    whole = batch(*(message(f"m{n}", event(n)) for n in range(1, 5)))
    assert failed(answer_batch(Poisoned(), whole, soon())) == ["m2"]


def test_what_is_not_stored_by_the_deadline_goes_back() -> None:
    class Slow(SmallApplication):
        def accept_events(
            self, request: EventsRequest, deadline: float | None, carrier: Mapping[str, str]
        ) -> EventsResponse:
            time.sleep(0.2)
            return super().accept_events(request, deadline, carrier)

    whole = batch(*(message(f"m{n}", {"events": [event(f"{n}-{k}") for k in range(MAX_EVENTS)]}) for n in range(4)))
    assert failed(answer_batch(Slow(), whole, time.monotonic() + 0.3)) == ["m2", "m3"]


@pytest.mark.parametrize("source", ["aws:sns", "aws:kinesis", None])
def test_records_of_another_source_fail_the_invocation(source: str | None) -> None:
    record = {"EventSource" if source == "aws:sns" else "eventSource": source} if source else {}
    with pytest.raises(RequestError, match="are not taken; connect the function to an SQS queue"):
        answer_batch(SmallApplication(), {"Records": [record]}, soon())


@pytest.fixture(scope="module")
def function() -> Iterator[RuntimeApi]:
    with running_function("lambda_target.handler") as api:
        yield api


def test_the_real_runtime_client_gets_the_failures(function: RuntimeApi) -> None:
    answer = json.loads(function.invoke(batch(message("m1", event(1)), message("m2", "?"))))
    assert failed(answer) == ["m2"]
    assert json.loads(function.invoke({"Records": []})) == {"batchItemFailures": []}
    with pytest.raises(RuntimeError, match="are not taken"):
        function.invoke({"Records": [{"eventSource": "aws:sns"}]})


def test_a_function_that_cannot_start_hands_the_batch_back() -> None:
    class Context:
        aws_request_id = str(uuid.uuid4())
        client_context = None

        def get_remaining_time_in_millis(self) -> int:
            return 10_000

    def broken() -> SmallApplication:
        raise Unavailable("not yet")

    answer = create_handler(broken)(batch(message("m1", event(1))), Context())
    assert isinstance(answer, dict)
    assert failed(answer) == ["m1"]
