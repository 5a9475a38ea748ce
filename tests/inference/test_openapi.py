"""The OpenAPI document: it is what the models say, every door serves it, and the running application keeps to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psycopg
import pytest
import schemathesis
from conftest import replace_database
from door_app import SmallApplication
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.checks import not_a_server_error
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import negative_data_rejection
from served_world import ServedWorld, build
from test_asgi_door import ask, served
from worlds import key_header

from inference import openapi
from inference.handlers.asgi import create_app
from inference.http import handle
from inference.routes import ROUTES, route_of
from schemas.events import MAX_ID_BYTES
from schemas.serving_fields import KEY_FORMAT

# Characters of up to four bytes: as many as the limit allows in any of them.
KEYS = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters=[*map(chr, range(32)), "\x7f"]),
    min_size=1,
    max_size=32,
).filter(lambda key: len(key.encode()) <= MAX_ID_BYTES)
schemathesis.openapi.format(KEY_FORMAT, KEYS)


def test_the_file_is_what_the_models_say() -> None:
    assert openapi.DOCUMENT.read_text(encoding="utf-8") == openapi.text(), "run `make openapi`"


def test_it_is_a_valid_document_of_every_route() -> None:
    document = openapi.document()
    OpenAPIV31SpecValidator(document).validate()
    assert {path: {method.upper() for method in said} for path, said in document["paths"].items()} == {
        path: {method} for path, (method, _) in ROUTES.items()
    }


def test_a_route_that_wants_a_key_says_so_and_names_what_its_path_names() -> None:
    said = openapi.document()["paths"]["/people/{user_id}/forget"]["post"]
    assert said["operationId"] == "post_people_user_id_forget"
    assert [(p["name"], p["in"], p["schema"]["format"]) for p in said["parameters"]] == [
        ("user_id", "path", KEY_FORMAT)
    ]
    assert said["security"] == [{"key": ["admin"]}, {"link": []}]
    assert {"202", "401", "403", "404", "429"} <= said["responses"].keys()


def test_a_door_serves_it() -> None:
    response = handle(SmallApplication(), "GET", "/openapi.json", {}, b"", deadline=None)
    assert (response.status, response.headers["content-type"]) == (200, "application/json")
    assert json.loads(response.body) == json.loads(openapi.text())


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedWorld]:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE fuzzed TEMPLATE {template}")
    yield build(replace_database(postgres_url, "fuzzed"), tmp_path_factory.mktemp("fuzzed"))
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP DATABASE fuzzed WITH (FORCE)")


@pytest.fixture(scope="module")
def key(world: ServedWorld) -> dict[str, str]:
    # Schemathesis takes it away again, by this spelling, to see that the application then refuses.
    return {"Authorization": key_header(world.url, per_minute=100_000)["authorization"]}


@pytest.fixture(scope="module")
def port(world: ServedWorld) -> Iterator[int]:
    with served(create_app(world.application)) as number:
        yield number


def whole(body: Any) -> Any:
    """`body` with whole numbers where it has them with a point: to JSON Schema 1.0 is one, the function refuses it."""
    if not isinstance(body, dict):
        return body
    counts: dict[str, Any] = {
        name: int(body[name]) for name in ("k", "timeout_ms", "answer") if _has_a_point(body.get(name))
    }
    if isinstance(body.get("answers"), list):
        counts["answers"] = [whole(answer) for answer in body["answers"]]
    return body | counts


def _has_a_point(value: object) -> bool:
    return isinstance(value, float) and value.is_integer()


_WHERE_IDS_ARE = (ParameterLocation.PATH, ParameterLocation.BODY)


def checked(case: Any, port: int, key: dict[str, str]) -> None:
    """Ask, and hold the answer to all that the document says."""
    case.body = whole(case.body)
    base_url = f"http://127.0.0.1:{port}"
    if route_of(unquote(case.formatted_path))[0] not in (None, case.path):
        # An id may hold a slash: `/people/u/forget/history` is the history of `u/forget`, which its own route's turn is for.
        case.call_and_validate(base_url=base_url, headers=key, checks=[not_a_server_error])
        return
    # To Schemathesis every value violates a format that is no standard one, also `0` that of an id; it does not say which
    # format it meant, so that standard ones are not looked at either. Nothing but this one check is left out.
    taken_for_wrong = [negative_data_rejection] if _only_against_a_format(case) else []
    case.call_and_validate(base_url=base_url, headers=key, excluded_checks=taken_for_wrong)


def _only_against_a_format(case: Any) -> bool:
    mutations = getattr(case.meta.phase.data, "mutations", None) or () if case.meta else ()
    elsewhere = [set(one.keywords) - {"format"} for one in mutations if one.parameter_location in _WHERE_IDS_ARE]
    return any("format" in one.keywords for one in mutations) and not any(elsewhere)


# What is wrong and too large besides is refused for its size, which Schemathesis does not expect.
REFUSALS = [400, 401, 403, 404, 413, 415, 422, 429, "5xx"]
CONFIG = schemathesis.Config.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}}})
schema = schemathesis.openapi.from_dict(openapi.document(), config=CONFIG)
SAME_EVERY_TIME = settings(
    max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@schema.parametrize()
@SAME_EVERY_TIME
def test_the_application_keeps_to_it(case: Any, port: int, key: dict[str, str]) -> None:
    checked(case, port, key)


@pytest.mark.prove
@pytest.mark.timeout(3_600)
@schema.parametrize()
@settings(max_examples=5_000, database=None, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_application_keeps_to_it_however_long_one_tries(case: Any, port: int, key: dict[str, str]) -> None:
    checked(case, port, key)


def test_the_served_document_is_the_file(port: int) -> None:
    status, _, body = ask(port, "/openapi.json", method="GET")
    assert (status, json.loads(body)) == (200, json.loads(Path(openapi.DOCUMENT).read_text()))
