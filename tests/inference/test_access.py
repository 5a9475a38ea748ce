"""Request keys against a real table: which are let in, for what, how often, and while the database is away."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from door_app import SmallApplication
from lambda_runtime_api import running_function
from test_asgi_door import served
from test_store import counting_proxy
from worlds import key_header, serving

from inference.access import ApiKeys, Platform, TokenBucket, access_of
from inference.handlers.asgi import create_app
from inference.handlers.aws_lambda import create_handler
from inference.http import handle
from inference.links import Links
from inference.routes import ROUTES, SCOPES
from inference.runtime import LarderApplication
from inference.settings import Settings, read_settings
from inference.store import Store
from infra import keys, roles
from schemas.errors import Forbidden, SettingsError, TooManyRequests, Unauthorized, Unavailable
from schemas.keys import take_apart
from schemas.roles import FUNCTION
from schemas.urls import with_user

JSON = {"content-type": "application/json"}
ASK = json.dumps({"user_id": "u1"}).encode()


class Clock:
    """A clock that stands until it is set forward."""

    def __init__(self) -> None:
        self.seconds = 1_000.0

    def __call__(self) -> float:
        return self.seconds


class CountingStore(Store):
    """A store that counts its questions, can be away, and can be held up."""

    __slots__ = ("asked", "away", "gate")

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked, self.away, self.gate = 0, False, threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Whoever asks meanwhile waits until the end."""
        with self.gate:
            yield

    def rows(self, *arguments: Any) -> list[tuple[Any, ...]]:
        with self.gate:
            self.asked += 1
        if self.away:
            raise Unavailable("the database cannot be reached")
        return super().rows(*arguments)


@pytest.fixture
def store(database: str) -> Iterator[CountingStore]:
    opened = CountingStore(roles.serving_urls(database)[0])
    yield opened
    opened.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def access(store: CountingStore, clock: Clock) -> ApiKeys:
    return ApiKeys(store, cache_seconds=60, now=clock)


# --- which keys are let in ------------------------------------------------------------------------------------------


def test_a_good_key_is_let_in_for_its_scopes_alone(access: ApiKeys, database: str) -> None:
    header = key_header(database, ["recommend"])
    access.check(header, "recommend")
    access.check(header, None)
    with pytest.raises(
        Forbidden, match=r"key [0-9a-f]{12} may recommend, and this needs write; use a key that may post"
    ):
        access.check(header, "write")
    admin = key_header(database, ["admin"])
    for scope in ("recommend", "write", "admin"):
        access.check(admin, scope)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda key: None, "there is no key; send 'authorization: Bearer <key>'"),
        (lambda key: "", "there is no key"),
        (lambda key: key.removeprefix("Bearer "), "holds no key of ours"),
        (lambda key: key.replace("Bearer", "Basic"), "holds no key of ours"),
        (lambda key: f"{key}, {key}", "one key and no more"),
        (lambda key: key + "0", "holds no key of ours"),
        (lambda key: key[:-1] + ("0" if key[-1] != "0" else "1"), "this key is not known"),
        (lambda key: key.replace(key[14:26], "0" * 12), "this key is not known"),
    ],
)
def test_anything_else_is_not(access: ApiKeys, database: str, change: Callable[[str], str | None], said: str) -> None:
    key = key_header(database)["authorization"]
    changed = change(key)
    headers = {} if changed is None else {"authorization": changed}
    with pytest.raises(Unauthorized, match=said) as refused:
        access.check(headers, "recommend")
    assert take_apart(key.split()[1])[1] not in str(refused.value)  # type: ignore[index]  # it is one


def test_an_expired_key_is_refused_although_it_is_still_in_memory(access: ApiKeys, database: str) -> None:
    soon = datetime.now(UTC) + timedelta(milliseconds=300)
    header = key_header(database, expires_at=soon)
    access.check(header, "recommend")
    while datetime.now(UTC) < soon:
        pass
    with pytest.raises(Unauthorized, match=r"expired on \d{4}-.* UTC; have a new one made"):
        access.check(header, "recommend")


def test_a_revocation_counts_within_the_time_that_a_key_is_kept(
    access: ApiKeys, store: CountingStore, clock: Clock, database: str, connection: psycopg.Connection[Any]
) -> None:
    header = key_header(database)
    for _ in range(10):
        access.check(header, "recommend")
    assert store.asked == 1
    keys.revoke(connection, header["authorization"].split()[1])
    connection.commit()
    clock.seconds += 29
    access.check(header, "recommend")
    assert store.asked == 1
    clock.seconds += 32
    with pytest.raises(Unauthorized, match="was revoked on"):
        access.check(header, "recommend")
    assert store.asked == 2


def test_a_key_in_use_is_looked_up_beside_the_requests(
    access: ApiKeys, store: CountingStore, clock: Clock, database: str, connection: psycopg.Connection[Any]
) -> None:
    header = key_header(database)
    access.check(header, "recommend")
    keys.revoke(connection, header["authorization"].split()[1])
    connection.commit()
    clock.seconds += 31
    with store.held():
        access.check(header, "recommend")  # nobody waits for the database
    access.close()
    assert store.asked == 2
    with pytest.raises(Unauthorized, match="was revoked on"):
        access.check(header, "recommend")


def test_a_key_that_is_known_stays_good_while_the_database_is_away_and_no_other_is_let_in(
    access: ApiKeys, store: CountingStore, clock: Clock, database: str
) -> None:
    known, unknown = key_header(database), key_header(database)
    access.check(known, "recommend")
    store.away = True
    clock.seconds += 3_600
    for _ in range(3):
        access.check(known, "recommend")
    assert store.asked == 2  # the database is not asked again for every request
    with pytest.raises(Unauthorized, match="not known"):
        access.check({"authorization": known["authorization"][:-4] + "0000"}, "recommend")
    with pytest.raises(Unavailable, match="cannot be checked while the database is away"):
        access.check(unknown, "recommend")
    clock.seconds += 6
    with store.held():
        access.check(known, "recommend")  # nor does anybody wait for it any more
    access.close()
    store.away = False
    access.check(unknown, "recommend")


def test_guessed_keys_do_not_keep_the_database_busy(access: ApiKeys, store: CountingStore, database: str) -> None:
    known = key_header(database)
    access.check(known, "recommend")
    outcomes = []
    for number in range(400):
        with pytest.raises((Unauthorized, Unavailable)) as refused:
            access.check({"authorization": f"Bearer larder_{number:012x}_{'0' * 64}"}, "recommend")
        outcomes.append(type(refused.value))
    assert outcomes[:50] == [Unauthorized] * 50
    assert outcomes[-1] is Unavailable
    assert store.asked <= 1 + 200
    access.check(known, "recommend")


def test_an_outage_leaves_nobody_waiting_once_it_is_over(access: ApiKeys, store: CountingStore, database: str) -> None:
    unknown = key_header(database)
    store.away = True
    for _ in range(400):
        with pytest.raises(Unavailable, match="cannot be checked while the database is away"):
            access.check(unknown, "recommend")
    store.away = False
    access.check(unknown, "recommend")


def test_an_id_that_is_unknown_is_looked_up_once_in_a_while(
    access: ApiKeys, store: CountingStore, clock: Clock
) -> None:
    wrong = {"authorization": f"Bearer larder_{'0' * 12}_{'0' * 64}"}
    for _ in range(5):
        with pytest.raises(Unauthorized):
            access.check(wrong, "recommend")
    assert store.asked == 1
    clock.seconds += 6
    with pytest.raises(Unauthorized):
        access.check(wrong, "recommend")
    assert store.asked == 2


def test_a_key_has_a_rate(access: ApiKeys, clock: Clock, database: str) -> None:
    slow, other = key_header(database, per_minute=60), key_header(database, per_minute=60)
    for _ in range(10):
        access.check(slow, "recommend")
    with pytest.raises(TooManyRequests, match=r"may ask 60 times a minute; ask less often") as refused:
        access.check(slow, "recommend")
    assert refused.value.retry_after_seconds == 1
    access.check(other, "recommend")
    clock.seconds += 1.01
    access.check(slow, "recommend")
    with pytest.raises(TooManyRequests):
        access.check(slow, "recommend")
    # Being looked up again gives no new requests, and waiting for long no more than the burst.
    clock.seconds += 600
    for _ in range(10):
        access.check(slow, "recommend")
    with pytest.raises(TooManyRequests):
        access.check(slow, "recommend")


def test_one_request_a_minute_is_possible(clock: Clock) -> None:
    bucket = TokenBucket(1, clock)
    assert bucket.take() == 0
    assert bucket.take() == pytest.approx(60)
    clock.seconds += 60
    assert bucket.take() == 0


# --- at the doors ---------------------------------------------------------------------------------------------------


def guarded(access: ApiKeys) -> SmallApplication:
    app = SmallApplication()
    app.access = access
    return app


def test_every_route_names_its_scope() -> None:
    assert set(SCOPES) == set(ROUTES)
    assert [route for route, scope in SCOPES.items() if scope is None] == [
        "/health",
        "/openapi.json",
        "/",
        "/web/{file}",
    ]


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("POST", "/recommendations", "recommend"),
        ("POST", "/similar", "recommend"),
        ("POST", "/events", "write"),
        ("POST", "/people/u1/forget", "admin"),
        ("GET", f"/people/u1/forget/{'0' * 32}", "admin"),
        ("GET", "/people", "recommend"),
        ("GET", "/people/u1/history", "recommend"),
        ("GET", "/people/u1/survey", "recommend"),
        ("POST", "/survey", "write"),
    ],
)
def test_a_route_answers_to_a_key_of_its_scope(
    access: ApiKeys, database: str, method: str, path: str, scope: str
) -> None:
    app = guarded(access)

    def ask(headers: Mapping[str, str]) -> Any:
        return handle(app, method, path, {**JSON, **headers}, b"{}", deadline=None)

    refused = ask({})
    assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert json.loads(refused.body)["error"]["type"] == "unauthorized"
    for other in {"recommend", "write"} - {scope}:
        assert ask(key_header(database, [other])).status == 403
    assert ask(key_header(database, [scope])).status in (200, 202, 422)


def test_a_limit_that_is_used_up_is_429_with_retry_after(access: ApiKeys, database: str) -> None:
    header = key_header(database, per_minute=1)
    app = guarded(access)
    assert handle(app, "POST", "/recommendations", {**JSON, **header}, ASK, deadline=None).status == 200
    answer = handle(app, "POST", "/recommendations", {**JSON, **header}, ASK, deadline=None)
    assert (answer.status, answer.headers["retry-after"]) == (429, "60")
    assert json.loads(answer.body)["error"]["type"] == "too_many_requests"


def test_a_body_is_not_read_for_whoever_is_not_let_in(access: ApiKeys) -> None:
    answer = handle(guarded(access), "POST", "/recommendations", {"content-type": "text/html"}, b"\xff", deadline=None)
    assert answer.status == 401


def test_health_tells_little_without_a_key(access: ApiKeys, database: str, store: CountingStore) -> None:
    app = guarded(access)
    for headers in ({}, {"authorization": "Bearer nonsense"}):
        answer = handle(app, "GET", "/health", headers, b"", deadline=None)
        assert (answer.status, json.loads(answer.body)) == (200, {"status": "ok"})
    known = key_header(database, ["write"])
    assert json.loads(handle(app, "GET", "/health", known, b"", deadline=None).body)["version"] == "1"
    store.away = True
    answer = handle(app, "GET", "/health", key_header(database), b"", deadline=None)
    assert (answer.status, json.loads(answer.body)) == (200, {"status": "ok"})


def test_the_http_door_checks_keys(access: ApiKeys, database: str) -> None:
    import http.client

    header = key_header(database)
    with served(create_app(lambda: guarded(access))) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

        def status(headers: list[tuple[str, str]]) -> int:
            connection.putrequest("POST", "/recommendations")
            for name, value in [*JSON.items(), ("content-length", str(len(ASK))), *headers]:
                connection.putheader(name, value)
            connection.endheaders(ASK)
            answer = connection.getresponse()
            answer.read()
            return answer.status

        good = ("Authorization", header["authorization"])
        assert status([good]) == 200
        assert status([]) == 401
        assert status([("Authorization", "Bearer x"), good]) == 401  # none can hide behind another
        connection.close()


def test_with_a_key_too_a_recommendation_takes_two_round_trips(database: str, tmp_path: Path) -> None:
    with counting_proxy(database) as (url, waits):
        settings = serving(database, tmp_path.as_uri(), audit_per_mille=0)
        app = LarderApplication.from_settings(replace(settings, database_url=with_user(url, FUNCTION)))
        headers = {**JSON, **key_header(database)}
        took = []
        for _ in range(4):
            before = len(waits)
            assert handle(app, "POST", "/recommendations", headers, ASK, deadline=None).status == 200
            took.append(len(waits) - before)
        app.close()
    assert took[1:] == [2, 2, 2]
    assert took[0] > 2  # the key is looked up once


@pytest.mark.parametrize("direct", ["keys", "keys-over-http", "platform"])
def test_who_checks_a_direct_invocation_is_a_setting(database: str, tmp_path: Path, direct: str) -> None:
    settings = serving(database, tmp_path.as_uri(), access=direct)
    reader = Store(settings.database_url)
    app = SmallApplication()
    app.access = access_of(settings, reader)
    handler = create_handler(lambda: app)
    gateway = {
        "requestContext": {"http": {"method": "POST", "path": "/recommendations"}},
        "rawPath": "/recommendations", "headers": JSON, "body": ASK.decode(),
    }  # fmt: skip

    class Context:
        aws_request_id = "r"
        client_context: Any = None

        def get_remaining_time_in_millis(self) -> int:
            return 10_000

    class WithKey(Context):
        class client_context:
            custom = key_header(database)

    over_http = handler(gateway, Context())
    invoked, invoked_with_key = (json.loads(handler({"user_id": "u1"}, made())) for made in (Context, WithKey))  # type: ignore[arg-type]
    reader.close()
    assert isinstance(over_http, dict)
    assert over_http["statusCode"] == (200 if direct == "platform" else 401)
    assert ("error" in invoked) == (direct == "keys")
    assert "items" in invoked_with_key


def test_a_function_checks_keys_unless_it_is_told_otherwise(database: str, tmp_path: Path) -> None:
    """Through the real runtime client and the real application."""
    settings = serving(database, tmp_path.as_uri())
    environment = {
        "DATABASE_URL": settings.database_url, "LARDER_WRITER_URL": settings.writer_url,
        "ARTIFACTS_URL": settings.artifacts_url,
    }  # fmt: skip
    with running_function("inference.handlers.aws_lambda.handler", environment) as function:
        assert json.loads(function.invoke({"user_id": "u1"}))["error"]["type"] == "unauthorized"


# --- settings -------------------------------------------------------------------------------------------------------


def test_settings_of_access_are_checked_and_quote_no_secret() -> None:
    needed = {"DATABASE_URL": "postgresql://x/y", "ARTIFACTS_URL": "file:///a"}
    assert read_settings(needed).access == "keys"
    wrong = {
        "DATABASE_URL": "mysql://u:CANARY@h/d", "LARDER_WRITER_URL": "CANARY", "LARDER_ACCESS": "nobody",
        "LARDER_KEY_CACHE_SECONDS": "0", "LARDER_LINK_KEYS": "a:CANARY",
    }  # fmt: skip
    with pytest.raises(SettingsError) as refused:
        read_settings(needed | wrong)
    for name in wrong:
        assert name in str(refused.value)
    assert "CANARY" not in str(refused.value)
    good = read_settings(
        needed | {"DATABASE_URL": "postgresql://u:CANARY@/d", "LARDER_LINK_KEYS": "a:CANARY" + "x" * 32}
    )
    assert "CANARY" not in repr(good)
    assert isinstance(access_of(Settings("", "", access="platform"), Store("")), Platform)


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def links() -> Links:
    return Links.read(f"b:{'s' * 40}, a:{'t' * 40}")


def test_a_link_is_for_one_person_one_purpose_and_some_time(links: Links) -> None:
    token = links.make("user/ü", "forget", 1)
    links.verify(token, "user/ü", "forget")
    for user, purpose in (("user/u", "forget"), ("user/ü", "export"), ("", "forget")):
        with pytest.raises(Unauthorized, match="signed for another person or purpose"):
            links.verify(token, user, purpose)
    version, key_id, expires, signature = token.split(".")
    for forged in (
        f"{version}.{key_id}.{int(expires) + 9}.{signature}",
        f"{version}.a.{expires}.{signature}",
        f"{version}.{key_id}.{expires}.{signature[:-1]}{'A' if signature[-1] != 'A' else 'B'}",
    ):
        with pytest.raises(Unauthorized, match="signed for another"):
            links.verify(forged, "user/ü", "forget")
    for nonsense in ("", "v1", f"v2.{key_id}.{expires}.{signature}", f"v1.zz.{expires}.{signature}", token + "A"):
        with pytest.raises(Unauthorized, match="no signed link of ours"):
            links.verify(nonsense, "user/ü", "forget")
    later = Links(links.keys, now=lambda: float(expires))
    with pytest.raises(Unauthorized, match="has expired"):
        later.verify(token, "user/ü", "forget")


def test_one_signing_key_can_follow_another(links: Links) -> None:
    before = Links.read(f"a:{'t' * 40}")
    links.verify(before.make("u", "forget", 1), "u", "forget")
    with pytest.raises(Unauthorized):
        before.verify(links.make("u", "forget", 1), "u", "forget")


def test_a_link_stands_for_a_key_where_it_is_about_its_person(access: ApiKeys, links: Links, database: str) -> None:
    app = guarded(access)
    token = links.make("u 1/x", "forget", 1)

    def ask(path: str, query: str, headers: Mapping[str, str] = {}) -> int:
        return handle(app, "POST", path, headers, b"", deadline=None, query=query).status

    assert ask("/people/u 1/x/forget", f"token={token}") == 401  # no secret is set
    access.links = links
    assert ask("/people/u 1/x/forget", f"token={token}") == 202
    assert ask("/people/u 2/forget", f"token={token}") == 401
    assert ask("/people/u 1/x/forget", "") == 401
    assert ask("/people/u 1/x/forget", f"token={links.make('u 1/x', 'export', 1)}") == 401
    # A key that is sent is what counts.
    assert ask("/people/u 1/x/forget", f"token={token}", key_header(database, ["recommend"])) == 403
    assert ask("/people/u 1/x/forget", "token=x", key_header(database, ["admin"])) == 202
    assert ask("/recommendations", f"token={token}") == 401
