"""`make serve`: the HTTP function on this machine, with the current deployment's database and artefacts."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from infra import deployment as deployments
from infra import feature_tables, postgres
from infra.ports import free_port
from schemas.errors import LarderError, SettingsError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.serve", description="Answer over HTTP on this machine.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    try:
        record = deployments.current()
        free_port(options.host, options.port, "make serve PORT")
        if deployments.load(record.name) is None:
            raise SettingsError(f"nothing to serve in {deployments.home()}: run `make run` first")
        os.environ["DATABASE_URL"] = postgres.prepare(record)
        # A feature that was added since the last run has no columns yet; reads ask for them from the first request on.
        feature_tables.ensure_view_tables(os.environ["DATABASE_URL"])
        os.environ.setdefault("ARTIFACTS_URL", record.artifacts_url)
    except LarderError as error:
        print(f"error ({error.type}): {error}", file=sys.stderr)
        return 1
    from inference.handlers import asgi

    # The server ends by itself on SIGTERM and then dies of it; here the embedded database still has to be let go of.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return asgi.main(["--host", options.host, "--port", str(options.port)])


if __name__ == "__main__":
    sys.exit(main())
