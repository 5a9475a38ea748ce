"""Whether a port is to be had, told before anything is started."""

from __future__ import annotations

import socket

from schemas.errors import SettingsError


def free_port(host: str, port: int, way_out: str) -> None:
    """Raise SettingsError unless this process may listen on `host`:`port`; `way_out` names what sets the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "a port is 0 to 65535"
            raise SettingsError(
                f"cannot listen on {host}:{port} ({reason}); choose another port: {way_out}=…"
            ) from error
