"""The Spark side of a snapshot: the compiled statements over the lake's files, the rows as Parquet for Postgres' writer.

A script that launch.py starts through Dagster Pipes. It imports nothing of ours, so that a machine that starts it needs
Spark and dagster-pipes alone; executors run SQL only, and need no Python at all.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from dagster_pipes import PipesContext, open_dagster_pipes

_REASON_CHARS = 1_500


def main() -> int:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    with open_dagster_pipes() as pipes:
        try:
            _run(pipes, pipes.extras)
        except Exception as error:  # noqa: BLE001  # the one edge of this process: whoever started it gets the reason
            pipes.report_custom_message({"failed": _reason(error)[:_REASON_CHARS]})
            return 1
    return 0


def _run(pipes: PipesContext, job: Any) -> None:
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import broadcast

    start = time.monotonic()
    builder = SparkSession.builder.appName(job["name"])
    for name, value in job["conf"].items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    try:
        pipes.report_custom_message({"up": spark.version})
        pipes.log.info(
            f"{job['name']}: Spark {spark.version} is up on {spark.sparkContext.master} "
            f"after {time.monotonic() - start:.1f} s; reading {len(job['events'])} files"
        )
        # The schema is given, not read: a column added later is NULL in older files, as it is for DuckDB.
        spark.read.schema(job["event_schema"]).parquet(*job["events"]).createOrReplaceTempView("events")
        spark.read.parquet(job["items"]).createOrReplaceTempView("items")
        days = ", ".join(f"DATE '{day}'" for day in job["days"])
        # A few days against all tiles: sent to every executor, the tiles are not moved to meet them.
        broadcast(spark.sql(f"SELECT explode(array({days})) AS partition_date")).createOrReplaceTempView("days")
        spark.sql(job["tiles_sql"]).createOrReplaceTempView("tiles")
        spark.sql(job["snapshot_sql"]).write.parquet(job["output"])
        pipes.log.info(f"{job['name']}: computed, {time.monotonic() - start:.1f} s")
    finally:
        spark.stop()


def _reason(error: Exception) -> str:
    """What went wrong, from the outermost error to its cause, without the stack traces that Java writes into messages."""
    java = getattr(error, "java_exception", None)
    if java is None:
        said = [f"{type(error).__name__}: {error}"]
    else:
        said = []
        while java is not None:
            said.append(f"{java.getClass().getSimpleName()}: {java.getMessage()}")
            java = java.getCause()
    lines = (line.strip() for one in said for line in one.split("JVM stacktrace")[0].splitlines())
    kept = dict.fromkeys(line for line in lines if line and not line.startswith(("at ", "... ", "Driver stacktrace")))
    return "; ".join(kept)


def _end_with_the_parent() -> None:
    # Nobody writes to this pipe: it ends when the process that holds the other end does, however that ended.
    # Read past Python's buffer: its lock, held by a daemon thread, aborts the interpreter on its way out.
    os.read(0, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
