"""The function over HTTP in a process of its own, with the bench's views, as `make serve` runs it; and what is seen of it.

python -m tests.benchmarks.serving_process --port 0
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks import serving_world

if __name__ == "__main__":
    serving_world.install()  # before anything reads the views

ROOT = Path(__file__).parents[2]
_TICKS = os.sysconf("SC_CLK_TCK")


class Client:
    """One connection that stays open, for requests with JSON bodies; as little work of its own as a client can have."""

    def __init__(self, port: int, headers: Mapping[str, str]) -> None:
        self._head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        head = f"POST {path} HTTP/1.1\r\nhost: bench\r\n{self._head}content-length: {len(body)}\r\n\r\n"
        self._socket.sendall(head.encode() + body)
        got = b""
        while (end := got.find(b"\r\n\r\n")) < 0:
            got += self._more()
        found = re.search(rb"content-length: (\d+)", got[:end], re.IGNORECASE)
        if found is None:
            raise ConnectionError("an answer without its length")
        while len(got) < end + 4 + int(found[1]):
            got += self._more()
        return int(got[9:12]), got[end + 4 :]

    def close(self) -> None:
        self._socket.close()

    def _more(self) -> bytes:
        part = self._socket.recv(1 << 16)
        if not part:
            raise ConnectionError("the function closed the connection")
        return part


@contextmanager
def served(environment: Mapping[str, str]) -> Iterator[tuple[int, int]]:
    """The function over HTTP, ready; its port and its process."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.serving_process", "--port", "0"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "LARDER_REQUEST_LOG": "off", "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"listens on http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise RuntimeError(f"the function did not start: it ended with {process.wait()}")
        # Nobody reads what else it says; a full pipe would stop it.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield int(found[1]), process.pid
    finally:
        process.terminate()
        process.wait(20)


def cpu_seconds(*pids: int) -> float:
    """What processes that are there have used so far, threads and the kernel's work for them included."""
    return sum(sum(map(int, _stat(pid)[11:13])) for pid in pids) / _TICKS


def postgres_processes(url: str) -> tuple[int, ...]:
    """The server at `url`, by its socket's folder, and its children."""
    found = re.search(r"host=([^&]+)", url)
    assert found is not None, f"{url} names no folder"
    (first, *_) = (Path(found[1]) / "postmaster.pid").read_text().splitlines()
    everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return (int(first), *(pid for pid in everyone if _stat(pid)[1:2] == [first]))


def rss_bytes(pid: int | None = None) -> int:
    """What a process, by default this one, holds in memory now."""
    pages = int(Path(f"/proc/{pid or 'self'}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat after the name; nothing of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


if __name__ == "__main__":
    from inference.handlers import asgi

    sys.exit(asgi.main(sys.argv[1:]))
