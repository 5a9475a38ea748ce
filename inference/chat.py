"""A language model behind the OpenAI chat protocol (`POST <url>/chat/completions`): one question, one JSON answer, in time.

Plain http.client: the protocol is one request. What comes back is bounded in time and size, and trusted in nothing.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from schemas.errors import SettingsError, Unavailable

MAX_ANSWER_BYTES = 64 * 1024
MAX_TOKENS = 400
_CHUNK = 4_096


class ChatFailed(Unavailable):
    """The server did not answer, not in time, or not by the protocol."""


@dataclass(frozen=True, slots=True)
class Chat:
    """One model at one server. `url` ends before `/chat/completions`; nothing that a request holds is ever part of it."""

    url: str
    model: str
    key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        try:
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is none
            usable = False
        if not usable or parts.query or parts.fragment or parts.username is not None:
            # Not quoted: somebody may have put a password there.
            raise SettingsError(
                "LARDER_LLM_URL cannot be used; give http:// or https://, a host and the path before /chat/completions, "
                "such as http://127.0.0.1:8000/v1, and the key in LARDER_LLM_KEY"
            )
        if not self.model:
            raise SettingsError("LARDER_LLM_MODEL is not set; name the model that LARDER_LLM_URL should use")
        if not self.key.isascii() or not self.key.isprintable():
            raise SettingsError("LARDER_LLM_KEY holds a character that no header can; look at the end of it")

    def ask(self, instructions: str, question: str, schema: Mapping[str, Any], seconds: float) -> str:
        """What the model says to `question`, which should be JSON by `schema`; at most `seconds` in all.

        Raises ChatFailed, whose text holds nothing of the question, of the answer or of the key.
        """
        ends = time.monotonic() + seconds
        body = json.dumps(
            {
                "model": self.model,
                "messages": [
                    {"role": "system", "content": instructions},
                    {"role": "user", "content": question},
                ],
                "temperature": 0,
                "max_tokens": MAX_TOKENS,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "strict": True, "schema": schema},
                },
            }
        ).encode()
        try:
            raw = self._post(body, ends)
            content = json.loads(raw)["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError, ValueError, RecursionError):
            raise ChatFailed("the language model's server does not speak the chat protocol") from None
        except (OSError, http.client.HTTPException) as error:
            raise ChatFailed(f"the language model could not be asked: {type(error).__name__}") from None
        if not isinstance(content, str):
            raise ChatFailed("the language model said nothing")
        return content

    def _post(self, body: bytes, ends: float) -> bytes:
        """The body of the answer. A socket's timeout counts per read, so that what drips is watched by the clock as well."""
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, parts.port, timeout=_left(ends), context=context)
        else:
            connection = http.client.HTTPConnection(host, parts.port, timeout=_left(ends))
        headers = {"content-type": "application/json", "accept": "application/json", "connection": "close"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        try:
            connection.connect()
            sock = connection.sock
            sock.settimeout(_left(ends))
            connection.request("POST", f"{parts.path.rstrip('/')}/chat/completions", body, headers)
            sock.settimeout(_left(ends))
            response = connection.getresponse()
            if response.status != 200:
                raise ChatFailed(f"the language model's server answered {response.status}")
            found = bytearray()
            while True:
                sock.settimeout(_left(ends))
                chunk = response.read1(_CHUNK)
                if not chunk:
                    return bytes(found)
                found += chunk
                if len(found) > MAX_ANSWER_BYTES:
                    raise ChatFailed(f"the language model's answer is longer than {MAX_ANSWER_BYTES} bytes")
        finally:
            connection.close()


def open_chat(environ: Mapping[str, str] = os.environ) -> Chat | None:
    """The model that the environment names, None if it names none. Raises SettingsError if what it says cannot be used."""
    if not environ.get("LARDER_LLM_URL"):
        return None
    return Chat(environ["LARDER_LLM_URL"], environ.get("LARDER_LLM_MODEL", ""), environ.get("LARDER_LLM_KEY", ""))


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise ChatFailed("the language model did not answer in time")
    return left
