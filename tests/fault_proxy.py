"""A TCP proxy in front of Postgres that breaks the network on demand: latency, resets, silence, truncation, refusal."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import parse_qs, urlsplit


class FaultProxy:
    """Forwards to `target`, a Unix socket's path, until one of its faults is switched on. All faults end with `mend`."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self.latency_seconds = 0.0
        self.silent = False
        """Half-open: what comes is taken, nothing is ever answered, on connections old and new."""
        self.resets = False
        """Every connection ends with a reset as soon as it is made."""
        self.truncate_after: int | None = None
        """The next answer is cut off after so many bytes, in the middle of a message, and its connection closed."""
        self._dead: set[int] = set()
        self.accepted = 0
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]

    # --- faults --------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Close every connection there is, as a server does that restarts."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for side in pair:
                _end(side, reset=False)

    def reset(self) -> None:
        """Reset every connection there is, and every new one."""
        self.resets = True
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for client, server in pairs:
            _end(client, reset=True)
            _end(server, reset=False)

    def forget(self) -> None:
        """The connections there are go silent for ever, new ones work: what a router does that lost its table."""
        with self._lock:
            self._dead |= {id(client) for client, _ in self._pairs}

    def refuse(self) -> None:
        """Nobody listens any more, and every connection is closed."""
        _end(self._listener, reset=False)
        self.cut()

    def mend(self) -> None:
        """Everything new works again; what was broken stays so."""
        self.silent, self.resets, self.truncate_after, self.latency_seconds = False, False, None, 0.0
        if self._listener.fileno() < 0:
            self._listener = self._listen(self.port)

    # --- the proxy -----------------------------------------------------------------------------------------------

    def stop(self) -> None:
        self._stopping = True
        self.refuse()
        for thread in self._threads:
            thread.join(10)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), backlog=64)
        self._start(self._accept, listener)
        return listener

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            if self.resets:
                _end(client, reset=True)
                continue
            server = socket.socket(socket.AF_UNIX)
            if self.silent:
                with self._lock:  # it will never have another side, also when the fault has ended
                    self._dead.add(id(client))
            else:
                try:
                    server.connect(self._target)
                except OSError:  # the real server is not there
                    _end(client, reset=True)
                    server.close()
                    continue
            with self._lock:
                self._pairs.append((client, server))
            self._start(self._pump, client, server, client, False)
            if id(client) not in self._dead:
                self._start(self._pump, server, client, client, True)

    def _pump(self, source: socket.socket, sink: socket.socket, client: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if answers and self.latency_seconds:
                    time.sleep(self.latency_seconds)
                if self.silent:
                    self._dead.add(id(client))
                if id(client) in self._dead:
                    continue
                if answers and self.truncate_after is not None:
                    sink.sendall(data[: self.truncate_after])
                    break
                sink.sendall(data)
        for side in (source, sink):
            _end(side, reset=False)


def _end(side: socket.socket, *, reset: bool) -> None:
    with suppress(OSError):
        if reset:
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            side.shutdown(socket.SHUT_RDWR)
    side.close()


@contextmanager
def faulty(url: str) -> Iterator[tuple[str, FaultProxy]]:
    """A URL for the database at `url` that leads through a proxy, and the proxy."""
    parts = urlsplit(url)
    proxy = FaultProxy(f"{parse_qs(parts.query)['host'][0]}/.s.PGSQL.5432")
    try:
        yield f"postgresql://postgres@127.0.0.1:{proxy.port}{parts.path}?sslmode=disable&gssencmode=disable", proxy
    finally:
        proxy.stop()
