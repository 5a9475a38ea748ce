"""`make ui`: Dagster's webserver and daemon on the current deployment, its database up as long as they are."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from infra import deployment as deployments
from infra import postgres
from infra.arguments import MakeParser
from infra.deployment import Deployment
from infra.ports import free_port
from schemas import views as _views  # noqa: F401  # what is wrong in a declaration is said here, before Dagster does
from schemas.errors import LarderError

WEBSERVER = "webserver.json"
"""In a deployment's Dagster home while its UI runs: where it answers, and as which process."""

LINEAGE = "/assets/recommend_function?view=lineage&lineageScope=upstream&lineageDepth=20"
"""Where the webserver shows all that a recommendation is made from."""
_PATIENCE_SECONDS = 15


def prepare_dagster(record: Deployment) -> None:
    """Give `record` its Dagster home and point this process and its children at it.

    Where an instance of production is there (infra/dagster/production.yaml asks for DAGSTER_POSTGRES_URL), runs belong to it.
    """
    os.environ["DEPLOYMENT"] = record.name
    if os.environ.get("DAGSTER_POSTGRES_URL") and os.environ.get("DAGSTER_HOME"):
        return
    home = record.dagster_home
    home.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).parent / "dagster" / "dagster.yaml", home / "dagster.yaml")
    os.environ["DAGSTER_HOME"] = str(home)
    # One transaction for a hundred partition events instead of one each.
    os.environ.setdefault("DAGSTER_EVENT_BATCH_SIZE", "100")


def running_at(record: Deployment) -> str | None:
    """The URL where `make ui` of this deployment answers, or None if none runs."""
    try:
        recorded = json.loads((record.dagster_home / WEBSERVER).read_text())
        os.kill(recorded["pid"], 0)
        return str(recorded["url"])
    except (OSError, ValueError, KeyError):
        # Never started, or ended without tidying up.
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = MakeParser(
        "make ui [UI_PORT=3000]",
        variables={"port": "UI_PORT"},
        prog="python -m infra.ui",
        description="The Dagster UI of the current deployment.",
    )
    parser.add_argument("--port", type=int, default=3000)
    options = parser.parse_args(arguments)
    try:
        free_port("127.0.0.1", options.port, "make ui UI_PORT")
        record = deployments.current()
        record.save()
        postgres.prepare(record)
        prepare_dagster(record)
    except LarderError as error:
        print(f"error ({error.type}): {error}", file=sys.stderr)
        return 1
    url = f"http://127.0.0.1:{options.port}"
    webserver = record.dagster_home / WEBSERVER
    webserver.write_text(json.dumps({"url": url, "pid": os.getpid()}))
    print(f"deployment {record.name}: {url} (Ctrl-C stops it)\n  what is made from what: {url}{LINEAGE}", flush=True)
    dagster = str(Path(sys.executable).with_name("dagster"))
    command = [
        dagster,
        "dev",
        "--module-name",
        "orchestration.definitions",
        "--port",
        str(options.port),
        "--log-level",
        "warning",
    ]
    # Being told to stop is the same as Ctrl-C. Webserver, daemon and code servers are a group of their own: each hears of
    # it at once, and from nobody else.
    # A shell that starts it in the background has Ctrl-C ignored, by all of them.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, signal.default_int_handler)
    # Nobody who reads this typed the command that it would have them replace, nor wrote what it says may change.
    told = ("Function `dev_command` is superseded", "Parameter `owners` of initializer `SensorDefinition")
    quiet = {"PYTHONWARNINGS": ",".join(f"ignore:{start}" for start in told)}
    process = subprocess.Popen(command, start_new_session=True, env=os.environ | quiet)
    try:
        return process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_SECONDS)
        return 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        webserver.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
