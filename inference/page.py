"""The page for people: its few static files, read once, with the headers that keep it to itself.

It holds no data: whatever it shows it asks for with a key, as every other caller does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

INDEX = "index.html"
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml; charset=utf-8",
}
"""What a file below inference/web may be; all of them are text, which every door can carry."""
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Nothing from elsewhere, nothing inline, in nobody's frame: a key that is typed here can leave to here alone."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    # Asked for again each time, and answered 304 until the function is a new one: page and routes are always of one version.
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file as it is sent; `etag` is made of its content."""

    content_type: str
    etag: str
    body: bytes


@cache
def files() -> Mapping[str, PageFile]:
    """The page's files by name."""
    found: dict[str, PageFile] = {}
    for entry in (resources.files("inference") / "web").iterdir():
        kind = TYPES.get(entry.name.rpartition(".")[2])
        if kind is not None:
            body = entry.read_bytes()
            found[entry.name] = PageFile(kind, f'"{hashlib.sha256(body).hexdigest()[:32]}"', body)
    return found


def names() -> list[str]:
    """What may be asked for beside the page itself."""
    return sorted(name for name in files() if name != INDEX)


def answer(name: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes] | None:
    """Status, headers and body for one file; 304 without a body if the caller has it already; None if there is none."""
    file = files().get(name)
    if file is None:
        return None
    sent = {**HEADERS, "etag": file.etag}
    known = [tag.strip().removeprefix("W/") for tag in headers.get("if-none-match", "").split(",")]
    if file.etag in known:
        return 304, sent, b""
    return 200, {**sent, "content-type": file.content_type}, file.body
