"""A real HTTP server that speaks the OpenAI chat protocol, and fails in the ways that servers and models fail."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NOTHING: dict[str, Any] = {"years": None, "genres": [], "negations": []}


def answer(look_for: str = "", avoid: list[str] | None = None, **filters: Any) -> str:
    """What a model should say."""
    return json.dumps({"look_for": look_for, "avoid": avoid or [], "filters": NOTHING | filters})


@dataclass
class ChatServer:
    """`say` makes the model's text from the wish; `fault` names what goes wrong instead."""

    port: int
    say: Callable[[str], str] = answer
    fault: str = ""
    delay_seconds: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """A server for the time of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            return

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            made.asked.append(body)
            made.headers.append({name.lower(): value for name, value in self.headers.items()})
            made.paths.append(self.path)
            time.sleep(made.delay_seconds)
            self.close_connection = True
            if made.fault == "half-open":
                time.sleep(3)  # the socket is there and nobody is behind it
                return
            if made.fault == "500":
                self._send(500, b'{"error": "overloaded"}')
            elif made.fault == "redirect":
                self.send_response(302)
                self.send_header("location", f"http://127.0.0.1:{made.port}/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()
            elif made.fault == "malformed":
                self._send(200, b"<html>welcome")
            elif made.fault == "no choices":
                self._send(200, b'{"choices": []}')
            elif made.fault == "endless":
                self.send_response(200)
                self.end_headers()
                try:
                    for _ in range(100_000):
                        self.wfile.write(b" " * 65_536)
                except OSError:
                    return
            elif made.fault == "drip":
                self.send_response(200)
                self.send_header("content-length", "1000")
                self.end_headers()
                try:
                    for _ in range(40):
                        self.wfile.write(b" ")
                        self.wfile.flush()
                        time.sleep(0.1)
                except OSError:
                    return
            elif made.fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.connection.close()
            else:
                content = made.say(body["messages"][-1]["content"])
                message = {"message": {"role": "assistant", "content": content}}
                self._send(200, json.dumps({"choices": [message]}).encode())

        def _send(self, status: int, content: bytes) -> None:
            try:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # whoever asked has gone
                return

        do_GET = do_POST

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            return

    server = Server(("127.0.0.1", 0), Handler)
    made = ChatServer(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
