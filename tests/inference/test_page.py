"""The page's files: whole, light, from nowhere else, the same through every door, and not sent twice."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from door_app import SmallApplication
from lambda_runtime_api import RuntimeApi, running_function
from test_asgi_door import ask, served
from test_lambda_door import gateway_event

from inference import page
from inference.handlers.asgi import create_app
from inference.http import handle
from inference.routes import Response

WEB = Path(page.__file__).parent / "web"
MOST_BYTES = 200_000


def get(path: str, headers: dict[str, str] | None = None) -> Response:
    return handle(SmallApplication(), "GET", path, headers or {}, b"", deadline=None)


def test_the_page_and_all_it_names_is_there_and_light() -> None:
    index = get("/")
    assert (index.status, index.headers["content-type"]) == (200, "text/html; charset=utf-8")
    named = set(re.findall(r'(?:src|href)="(web/[^"]+)"', index.body.decode()))
    assert named == {f"web/{name}" for name in page.names()}
    assert sum(len(get(f"/{name}").body) for name in named) + len(index.body) < MOST_BYTES
    for script in WEB.glob("*.js"):
        for other in re.findall(r'from "\./([^"]+)"', script.read_text()):
            assert (WEB / other).is_file(), f"{script.name} imports {other}"


def test_nothing_comes_from_elsewhere_and_nothing_stands_inline() -> None:
    for file in WEB.iterdir():
        found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", file.read_text())
        assert [url for url in found if "www.w3.org" not in url] == [], file.name
    html = (WEB / "index.html").read_text()
    assert re.findall(r"<style|<script(?![^>]*src=)|\son\w+=|\sstyle=", html) == []
    for script in WEB.glob("*.js"):
        assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", script.read_text()) == []
    policy = dict(part.split(" ", 1) for part in get("/").headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


def test_what_a_browser_has_is_not_sent_again() -> None:
    first = get("/web/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = get("/web/app.js", {"if-none-match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert get("/web/style.css", {"if-none-match": first.headers["etag"]}).status == 200


@pytest.mark.parametrize("path", ["/web/index.html.bak", "/web/../http.py", "/web/..%2fhttp.py", "/web/", "/web"])
def test_there_is_no_other_file(path: str) -> None:
    assert get(path).status == 404


def test_it_goes_into_the_package_and_the_wheel() -> None:
    from infra import package

    packed = {file.name for file in package._ours() if file.parent == WEB}
    assert packed == {file.name for file in WEB.iterdir()}
    project = tomllib.loads((WEB.parents[1] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["inference"]
    assert all(any(fnmatch(f"web/{name}", pattern) for pattern in patterns) for name in packed)


@pytest.fixture(scope="module")
def function() -> Iterator[RuntimeApi]:
    with running_function("lambda_target.handler") as api:
        yield api


def test_every_door_serves_the_same_page(function: RuntimeApi) -> None:
    with served(create_app(SmallApplication)) as port:
        status, headers, body = ask(port, "/", method="GET", headers={})
        assert ask(port, "/", method="GET", headers={"if-none-match": headers["etag"]})[::2] == (304, b"")
    assert (status, body) == (200, get("/").body)
    answer = json.loads(function.invoke(gateway_event(None, "/", "GET")))
    assert (answer["statusCode"], answer["body"].encode()) == (200, body)
    assert answer["headers"]["content-security-policy"] == headers["content-security-policy"] == page.POLICY
