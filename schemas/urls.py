"""Where files lie, `file:///folder` or `s3://bucket/prefix`, and database URLs: what may be shown of one, TLS, another user."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

_SECRETS = ("password", "sslpassword")
_TRUSTED_ROOTS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
"""Where Debian, Red Hat and others keep the certificates that a machine trusts."""


def local_folder(url: str) -> Path | None:
    """The folder that a `file://` URL names, None for any other URL. What is escaped in it (`%20`) is a character."""
    return Path(unquote(urlsplit(url).path)) if url.startswith("file://") else None


def is_database_url(url: str) -> bool:
    """Whether `url` is one that Postgres' own libraries take."""
    return re.match(r"postgres(ql)?://", url) is not None


def shown(url: str) -> str:
    """A database URL without its passwords, for messages."""
    scheme, found, rest = url.partition("://")
    if not found:
        return "a text without ://"
    # Up to the last @, wherever that is: a password with /, ? or @ in it may be written without escaping them.
    user, at, place = rest.rpartition("@")
    user = user.partition(":")[0] + (":***" if ":" in user else "")
    return re.sub(rf"([?&](?:{'|'.join(_SECRETS)})=)[^&#]*", r"\1***", f"{scheme}://{user}{at}{place}")


def redacted(text: str, url: str) -> str:
    """`text` without the passwords of a database URL, nor pieces of them: a driver quotes what it could not read."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secrets(url: str) -> set[str]:
    user, _, _ = url.partition("://")[2].rpartition("@")
    whole = [user.partition(":")[2], *re.findall(rf"[?&](?:{'|'.join(_SECRETS)})=([^&#]*)", url)]
    found: set[str] = set()
    for secret in (form for raw in whole for form in (raw, unquote(raw))):
        found |= {secret, *(piece for piece in re.split(r"\W+", secret) if len(piece) >= 3)}
    return found - {""}


def with_tls(url: str, environ: Mapping[str, str] = os.environ) -> str:
    """A database URL that asks a server on another machine to prove who it is, unless it says otherwise itself.

    `sslmode` in the URL (or PGSSLMODE) is left as it is. Without `sslrootcert` the certificates count that this machine
    trusts (SSL_CERT_FILE, or where its system keeps them).
    """
    if not is_database_url(url) or not _is_remote(url, environ):
        return url
    parameters = dict(_query(url))
    if {"sslmode", "service"} & set(parameters) or environ.get("PGSSLMODE") or environ.get("PGSERVICE"):
        return url
    added = {"sslmode": "verify-full"}
    own = Path(environ.get("HOME", "/")) / ".postgresql" / "root.crt"
    if "sslrootcert" not in parameters and not environ.get("PGSSLROOTCERT") and not own.exists():
        known = [file for file in (environ.get("SSL_CERT_FILE"), *_TRUSTED_ROOTS) if file and Path(file).exists()]
        added["sslrootcert"] = known[0] if known else "system"
    # Added and nothing else touched: a URL that is not well formed is for Postgres' own library to refuse.
    return f"{url}{'&' if '?' in url else '?'}{urlencode(added, quote_via=quote, safe='/')}"


def with_user(url: str, user: str) -> str:
    """`url` for another user, who has no password."""
    scheme, _, rest = url.partition("://")
    place = rest.rpartition("@")[2] if "@" in rest.partition("?")[0] else rest
    kept = [(name, value) for name, value in _query(url) if name not in ("user", *_SECRETS)]
    return _with_query(f"{scheme}://{quote(user)}@{place}", kept)


def with_role(url: str, role: str) -> str:
    """`url` with the rights of `role` instead of those of its user, who must be a member of it."""
    parameters = dict(_query(url))
    parameters["options"] = f"{parameters.get('options', '')} -c role={role}".strip()
    return _with_query(url, list(parameters.items()))


def _is_remote(url: str, environ: Mapping[str, str]) -> bool:
    parameters = dict(_query(url))
    place = url.partition("://")[2].partition("?")[0].rpartition("@")[2].partition("/")[0]
    hosts = parameters.get("host") or place or environ.get("PGHOST", "")
    addresses = parameters.get("hostaddr") or environ.get("PGHOSTADDR", "")
    return any(not _is_local(host) for host in [*hosts.split(","), *addresses.split(",")])


def _is_local(host: str) -> bool:
    """Whether a host, with its port or without, is this machine; a path is a socket."""
    name = re.sub(r":\d*$", "", host) if host.count(":") < 2 or host.startswith("[") else host
    return name.startswith(("/", "@", "%2F", "%2f", "127.")) or name.strip("[]").lower() in ("", "localhost", "::1")


def _query(url: str) -> list[tuple[str, str]]:
    return parse_qsl(url.partition("?")[2], keep_blank_values=True)


def _with_query(url: str, parameters: list[tuple[str, str]]) -> str:
    # libpq reads a plus sign as one, not as a blank.
    text = urlencode(parameters, quote_via=quote, safe="/")
    return url.partition("?")[0] + (f"?{text}" if text else "")
