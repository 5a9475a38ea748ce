"""`make serve`: the HTTP function on this machine, with the current deployment's database and artefacts.

DATABASE_URL, which here prepares the database, becomes two: requests read as `larder_function` and write as `larder_writer`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import psycopg

from infra import deployment as deployments
from infra import feature_tables, keys, postgres, roles
from infra.arguments import MakeParser
from infra.deployment import Deployment
from infra.ports import free_port
from schemas.errors import LarderError, SettingsError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = MakeParser(
        "make serve [PORT=8080]", prog="python -m infra.serve", description="Answer over HTTP on this machine."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args(arguments)
    try:
        record = deployments.current()
        free_port(options.host, options.port, "make serve PORT")
        if deployments.load(record.name) is None:
            raise SettingsError(f"nothing to serve in {deployments.home()}: run `make run` first")
        named = os.environ.get("LARDER_EXPERIMENTS")
        if named and "://" not in named and not Path(named).exists():
            raise SettingsError(f"LARDER_EXPERIMENTS names {named!r}, and no file is there; correct it, or unset it")
        url = postgres.prepare(record)
        # A feature that was added since the last run has no columns yet; reads ask for them from the first request on.
        feature_tables.ensure_view_tables(url)
        os.environ["DATABASE_URL"], writer_url = roles.serving_urls(url)
        if not os.environ.get("LARDER_WRITER_URL"):
            os.environ["LARDER_WRITER_URL"] = writer_url
        _tell_of_keys(record, url, options.host, options.port)
        os.environ.setdefault("ARTIFACTS_URL", record.artifacts_url)
        os.environ["LARDER_EXPERIMENTS"] = record.experiments
        if record.rules:
            os.environ["LARDER_RULES"] = record.rules
    except LarderError as error:
        print(f"error ({error.type}): {error}", file=sys.stderr)
        return 1
    from inference.handlers import asgi

    # The server ends by itself on SIGTERM and then dies of it; here the embedded database still has to be let go of.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return asgi.main(["--host", options.host, "--port", str(options.port)])


def _tell_of_keys(record: Deployment, url: str, host: str, port: int) -> None:
    if os.environ.get("LARDER_ACCESS", "keys") == "platform":
        print("keys are not checked (LARDER_ACCESS=platform): whoever reaches this port may do anything", flush=True)
    elif host in ("127.0.0.1", "::1", "localhost"):
        try:
            with psycopg.connect(url) as connection:
                key = keys.development_key(connection, record.folder)
        except psycopg.errors.InsufficientPrivilege:
            print(f"no development key is shown: {keys.MAY_NOT}", flush=True)
            return
        print(f"development key, for this machine: it may do everything\n\n  export LARDER_KEY={key}\n", flush=True)
        if port:
            # After the # nothing is sent to a server; the page takes it out of the address at once.
            name = f"[{host}]" if ":" in host else host
            print(f"the page, opened with it\n\n  http://{name}:{port}/#key={key}\n", flush=True)
    else:
        print(
            f"{host} may be reached by others, so no development key is shown: `make keys NAME=…` makes one", flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
