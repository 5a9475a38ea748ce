"""Snapshots by Spark: one external process per chunk and view, started, watched and ended through Dagster Pipes.

lake's files, items ─▶ job.py on LARDER_SPARK_MASTER ─▶ Parquet in a scratch folder of the lake ─▶ DuckDB ─▶ Postgres
                          │ messages, logs (Pipes)                                └─ the writer of every engine ─┘
                          ▼
                       the run's page in Dagster
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import pyarrow as pa

from orchestration.compute.duck import duck
from orchestration.compute.engines import DuckDB, Engine, SnapshotJob
from orchestration.compute.lake import EVENT_SCHEMA
from orchestration.compute.scratch import open_scratch
from orchestration.compute.spark_sql import compile_view
from orchestration.spark.java import java_home
from schemas.errors import EngineError, LarderError, SettingsError

ENGINE_VARIABLE, MASTER_VARIABLE = "LARDER_ENGINE", "LARDER_SPARK_MASTER"
_MASTER = re.compile(r"^(local(\[.+\])?|local-cluster\[.+\]|yarn|(spark|k8s)://.+)$")
_JOB = Path(__file__).with_name("job.py")
_END_SECONDS = 10
_SHOWN_LINES = 12
_SQL_TYPES = {pa.string(): "STRING", pa.float64(): "DOUBLE", pa.timestamp("us", tz="UTC"): "TIMESTAMP"}


@contextmanager
def open_engine(context: dg.AssetExecutionContext, engine: str = "", master: str = "") -> Iterator[Engine]:
    """The engine that `engine`, or else LARDER_ENGINE, names. Raises SettingsError if it cannot be used."""
    cluster = check_engine(engine, master)
    if cluster is None:
        with DuckDB() as here:
            yield here
        return
    yield Spark(context, cluster)


def check_engine(engine: str = "", master: str = "") -> str | None:
    """The Spark cluster that `engine` and `master`, or else the environment, name; None where DuckDB is to be used.

    Raises SettingsError if it cannot be used.
    """
    engine = engine or os.environ.get(ENGINE_VARIABLE) or "duckdb"
    if engine == "duckdb":
        return None
    if engine != "spark":
        raise SettingsError(f"{ENGINE_VARIABLE} is {engine!r}; give duckdb or spark")
    master = master or os.environ.get(MASTER_VARIABLE) or "local[*]"
    if not _MASTER.match(master):
        raise SettingsError(
            f"{MASTER_VARIABLE} is {master!r}; give local[*], spark://host:port, k8s://https://host:port or yarn"
        )
    if importlib.util.find_spec("pyspark") is None:
        raise SettingsError(
            f"{ENGINE_VARIABLE} is 'spark', but pyspark is not installed; pip install -c constraints.txt '.[spark]'"
        )
    return master


class Spark:
    """Computes snapshots on the Spark cluster at `master`, within the Dagster step of `context`."""

    name = "spark"

    def __init__(self, context: dg.AssetExecutionContext, master: str) -> None:
        self._context = context
        self._master = master

    @contextmanager
    def snapshot(self, job: SnapshotJob) -> Iterator[duckdb.DuckDBPyConnection]:
        tiles_sql, snapshot_sql = compile_view(job.view)
        with open_scratch(job.lake.url, job.erasures) as scratch:
            # Spark reads no empty list of files.
            events = [f"{job.lake.root}/{path}" for path in job.files.values()] or [
                scratch.write("events.parquet", EVENT_SCHEMA.empty_table())
            ]
            extras = {
                "name": f"larder {job.view.name} {job.days[0]} to {job.days[-1]}",
                "conf": _conf(self._master, job.lake.url),
                "event_schema": ", ".join(f"{field.name} {_SQL_TYPES[field.type]}" for field in EVENT_SCHEMA),
                "events": [_url(job, path) for path in events],
                "items": _url(job, scratch.write("items.parquet", job.items)),
                "days": [day.isoformat() for day in job.days],
                "tiles_sql": tiles_sql,
                "snapshot_sql": snapshot_sql,
                "output": _url(job, f"{scratch.path}/snapshot"),
            }
            self._run(extras)
            with duck() as db:
                db.register("snapshot", scratch.read("snapshot"))
                yield db

    def _run(self, extras: dict[str, Any]) -> None:
        """Run job.py to its end. Raises EngineError if Spark never came up, LarderError if the job failed on it."""
        with (
            tempfile.TemporaryDirectory(prefix="larder-spark-") as folder,
            tempfile.TemporaryFile() as output,
            dg.open_pipes_session(
                context=self._context,
                context_injector=dg.PipesTempFileContextInjector(),
                message_reader=dg.PipesTempFileMessageReader(),
                extras=extras,
            ) as session,
        ):
            process = subprocess.Popen(
                [sys.executable, str(_JOB)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=_environment(self._master, Path(folder)) | dict(session.get_bootstrap_env_vars()),
                # A group of its own: Python, its Java and local executors end together.
                start_new_session=True,
            )
            try:
                status = process.wait()
            finally:
                _end(process)
            output.seek(max(0, output.seek(0, os.SEEK_END) - 20_000))
            said = output.read().decode(errors="replace")
        if status != 0:
            messages: dict[str, Any] = {}
            for message in session.get_custom_messages():
                messages |= message
            raise self._failed(extras["name"], status, messages, said)

    def _failed(self, name: str, status: int, messages: Mapping[str, Any], said: str) -> LarderError:
        lines = "\n".join([line for line in said.splitlines() if line.strip()][-_SHOWN_LINES:])
        self._context.log.error(f"{name}: the last that Spark said:\n{lines}")
        reason = messages.get("failed") or f"it ended with status {status}"
        if "S3AFileSystem not found" in reason:
            reason = (
                "Spark has no connector for s3://; name it in spark-defaults.conf (SPARK_CONF_DIR): spark.jars.packages "
                "org.apache.hadoop:hadoop-aws:<the version of Spark's own hadoop-client-api>"
            )
        if "up" in messages:
            return LarderError(
                f"the Spark job {name!r} failed on {self._master}: {reason}. Mend the cause and materialise the days again; "
                f"{ENGINE_VARIABLE}=duckdb builds them on this machine"
            )
        return EngineError(
            f"Spark did not start on {self._master!r}: {reason}; it said last: {lines[-800:]}. Check {MASTER_VARIABLE} and "
            f"the cluster, or set {ENGINE_VARIABLE}=duckdb"
        )


def _url(job: SnapshotJob, path: str) -> str:
    """The path as Spark's file systems name it."""
    return f"s3a://{path}" if job.lake.url.startswith("s3://") else f"file://{path}"


def _conf(master: str, lake_url: str) -> dict[str, str]:
    """Only what the values and the lake need; memory, cores and the like are spark-defaults.conf's, in SPARK_CONF_DIR."""
    conf = {
        "spark.master": master,
        "spark.sql.session.timeZone": "UTC",
        # The default, INT96, is neither UTC nor microseconds to any other reader.
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
        "spark.sql.ansi.enabled": "true",
        "spark.ui.showConsoleProgress": "false",
    }
    if master.startswith("local"):
        conf["spark.ui.enabled"] = "false"
    if lake_url.startswith("s3://"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            conf["spark.hadoop.fs.s3a.endpoint"] = endpoint
            conf["spark.hadoop.fs.s3a.path.style.access"] = "true"
            conf["spark.hadoop.fs.s3a.connection.ssl.enabled"] = str(endpoint.startswith("https")).lower()
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region:
            conf["spark.hadoop.fs.s3a.endpoint.region"] = region
    return conf


def _environment(master: str, folder: Path) -> dict[str, str]:
    environment = dict(os.environ) | {"JAVA_HOME": java_home(folder / "java")}
    if master.startswith("local"):
        # What a killed job leaves behind goes with the folder, and no name of this machine has to resolve.
        environment.setdefault("SPARK_LOCAL_DIRS", str(folder / "local"))
        environment.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    return environment


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the job's process group: at once politely, after some seconds for good."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()
