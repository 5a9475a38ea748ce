"""`make run`: the whole road from raw events to a recommendation, as Dagster runs; a repeat does only what is new."""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inference.settings import Settings, read_settings
from infra import deployment as deployments
from infra import postgres
from infra.deployment import Deployment
from infra.ui import prepare_dagster
from orchestration import interrupts
from orchestration.compute.forget import open_requests
from orchestration.compute.lake import Lake
from orchestration.compute.stale import DAILY
from orchestration.due import RETRAIN_AFTER_DAYS, what_is_due
from orchestration.progress import terminal
from orchestration.sources.open import is_simulated, open_source, simulated_world
from schemas.errors import LarderError, SettingsError
from schemas.manifest import ENCODER_PATH
from schemas.urls import local_folder

if TYPE_CHECKING:
    import dagster as dg

_LEARNING = {
    "training_set": "training set",
    "ranker": "ranker",
    "ranker_evaluation": "evaluation",
    "ranker_onnx": "ONNX export and gate",
}
SIMULATED_EPOCHS = 10
_ENCODER_TOLD_TIMES, _ENCODER_PATIENCE_SECONDS = 3, 5
console = Console(highlight=False)
errors = Console(highlight=False, stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m orchestration.run",
        description="Take raw events all the way to an explained recommendation. Safe to repeat: only what is new is done.",
    )
    parser.add_argument(
        "--data", help="a MovieLens folder, a folder or s3:// prefix with larder.toml (default: a simulated world)"
    )
    parser.add_argument(
        "--shift", action="store_true", help="shift tabular data so that its last event falls within the last week"
    )
    parser.add_argument("--user", help="whose recommendations to print (default: the most recently active person)")
    parser.add_argument("--retrain", action="store_true", help="train even if the last training is recent")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")  # third parties' notices belong into logs, not between two lines of progress
    again = _command(options)
    try:
        return _run(options)
    except LarderError as error:
        errors.print(f"[red]error[/red] ({error.type}): {escape(str(error))}", markup=True, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print(
            f"\ninterrupted; what was finished is kept, `{again}` goes on from there", soft_wrap=True, markup=False
        )
        return 130


def _command(options: argparse.Namespace) -> str:
    """The `make run` that was typed: another one would go on with another deployment."""
    given = {"DATA": options.data, "USER_ID": options.user, "RETRAIN": options.retrain, "SHIFT": options.shift}
    words = [f"{name}={shlex.quote('1' if value is True else value)}" for name, value in given.items() if value]
    name = os.environ.get("DEPLOYMENT")
    return " ".join([*([f"DEPLOYMENT={shlex.quote(name)}"] if name else []), "make run", *words])


def _run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    record = _deployment(options.data or None, options.shift)
    console.rule(f"Larder · deployment {record.name}")
    from orchestration.spark.launch import check_engine

    # What a step would only find out in the middle.
    Lake(record.lake_url)
    check_engine()
    with _step("database"):
        url = postgres.prepare(record)
        settings = read_settings({**os.environ, "DATABASE_URL": url, "ARTIFACTS_URL": record.artifacts_url})
    record.save()
    prepare_dagster(record)
    import dagster as dg

    from orchestration.definitions import defs
    from orchestration.resources import Larder

    larder = Larder()
    with dg.DagsterInstance.get() as instance, _encoder_ahead(record.artifacts_url) as encoder_is_there:
        launch = _Launcher(defs, instance)
        with _step("catalogue and events"):
            launch("source_events", "items")
        due = what_is_due(larder, options.retrain)
        if not due.parts:
            _note("features", "every partition is up to date")
        for assets, first, last in due.parts:
            of = "" if assets == DAILY else f" of {', '.join(assets)}"
            with _step(f"features, {first} to {last}{of}"):
                launch(*assets, partitions=(first, last))
        with _step("text vectors"):
            encoder_is_there()
            launch("text_vectors")
        with _step("popular items, co-visitation"):
            launch("popular_items", "co_visitation")
        if due.too_few is not None:
            _note("ranker", due.too_few)
        for asset in due.learning:
            # The simulated world is there to be seen working: fewer epochs than on somebody's own data.
            few = {"epochs": SIMULATED_EPOCHS} if asset == "ranker" and is_simulated(record.data) else None
            with _step(_LEARNING[asset]):
                launch(asset, config=few)
        if not due.learning and due.too_few is None:
            _note(
                "ranker",
                f"learned from events of the last {2 * RETRAIN_AFTER_DAYS} days (make run RETRAIN=1 trains anyway)",
            )
        with _step("item vectors, release"):
            # Without any model there is nothing to release, and the function answers from the floor.
            models = ("item_vectors", "skew_audit", "ranker_release") if due.learning or due.has_model else ()
            launch(*models, "recommend_function")
    _show(settings, options.user)
    if waiting := open_requests(url):
        _note("to be forgotten", f"{len(waiting):,} who asked wait for it: `make forget RESUME=1` erases them")
    console.print(
        f"\ndone in {time.monotonic() - began:.0f} s · next: `make ui` shows how it was made, `make serve` answers over HTTP"
    )
    return 0


def _deployment(data: str | None, shift: bool) -> Deployment:
    """The deployment for DATA: as recorded, or a new one with its start and shift settled now."""
    name = deployments.wanted() or deployments.name_for(data)
    simulated = is_simulated(data)
    if not simulated and data is not None and "://" in data and not data.startswith("s3://"):
        raise SettingsError(f"DATA is {data!r}; give a folder or s3://bucket/prefix")
    source = data if simulated or data is None or data.startswith("s3://") else str(Path(data).expanduser().resolve())
    found = deployments.load(name)
    if found is not None:
        if found.data != source and data is not None:
            raise SettingsError(
                f"deployment {name!r} was made from {found.data or 'the simulator'}, not from {source}; "
                "choose another name with DEPLOYMENT=<name>"
            )
        if not is_simulated(found.data):
            open_source(found.data, start=found.start_date, until=datetime.now(UTC)).time_range()
        return found
    now = datetime.now(UTC)
    days = simulated_world(data, now.date()).days if simulated else deployments.DEFAULT_DAYS
    start = now.date() - timedelta(days=days)
    opened = open_source(source, start=start, until=now)
    if simulated:
        return Deployment(name, source, start)
    first, last = opened.time_range()
    weeks = (now - last).days // 7 if opened.historical or shift else 0
    return Deployment(name, source, (first + timedelta(weeks=weeks)).date(), weeks * 7)


class _Launcher:
    """Materialises assets in this process on the deployment's Dagster instance, so that the UI shows every run."""

    def __init__(self, defs: dg.Definitions, instance: dg.DagsterInstance) -> None:
        self._job = defs.resolve_implicit_global_asset_job_def()
        self._instance = instance

    def __call__(
        self, *assets: str, partitions: tuple[date, date] | None = None, config: dict[str, Any] | None = None
    ) -> None:
        """Materialise `assets`, for a range of days if given; `config` is that of the one asset named."""
        import dagster as dg

        interrupts.check()
        tags = {}
        if partitions is not None:
            tags = {
                "dagster/asset_partition_range_start": partitions[0].isoformat(),
                "dagster/asset_partition_range_end": partitions[1].isoformat(),
            }
        result = self._job.execute_in_process(
            instance=self._instance,
            asset_selection=[dg.AssetKey(name) for name in assets],
            tags=tags,
            raise_on_error=False,
            # The terminal shows our progress; Dagster's own log is in the UI.
            run_config={
                "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
                "ops": {assets[0]: {"config": config}} if config else {},
            },
        )
        interrupts.check()
        if result.success:
            return
        failures = [event for event in result.all_events if event.is_step_failure]
        error = failures[0].step_failure_data.error if failures else None
        causes = []
        while error is not None:
            causes.append(error)
            error = error.cause
        # DuckDB takes the signal itself while it works, and all that is left of it is a failed query.
        if any(
            cause.cls_name == "DagsterExecutionInterruptedError" or "Query interrupted" in cause.message
            for cause in causes
        ):
            raise KeyboardInterrupt
        reason = causes[-1].message.strip() if causes else "the run's log says more"
        step = failures[0].step_key if failures else "a step"
        raise LarderError(f"{step} failed: {reason} (the whole story: `make ui`, run {result.run_id[:8]})")


@contextmanager
def _encoder_ahead(artifacts_url: str) -> Iterator[Callable[[], None]]:
    """Export the text encoder beside the first steps, which leave a processor idle; gives what waits for it.

    What fails here fails again, and is told, where the asset does the same.
    """
    root = local_folder(artifacts_url)
    if root is None:
        yield lambda: None
        return
    process = multiprocessing.get_context("spawn").Process(
        target=_export_encoder, args=(root / ENCODER_PATH,), daemon=True
    )
    process.start()
    try:
        yield process.join
    finally:
        # Told again until it has heard: what is raised in a __del__ is dropped.
        for _ in range(_ENCODER_TOLD_TIMES):
            process.terminate()
            process.join(_ENCODER_PATIENCE_SECONDS)
            if process.exitcode is not None:
                break
        else:
            process.kill()
            process.join()


def _export_encoder(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what is half made is removed
    sys.unraisablehook = lambda lost: None  # nobody reads here what was dropped; the parent asks again
    with contextlib.suppress(Exception, KeyboardInterrupt):
        from orchestration.compute.encoder import export_encoder

        export_encoder(folder)


@contextmanager
def _step(name: str) -> Any:
    """One step of the road on the terminal: its progress while it runs, its time when it is done."""
    start = time.monotonic()
    console.print(f"[bold]{name}[/bold]")
    handler = _Lines()
    terminal.addHandler(handler)
    try:
        yield
    finally:
        terminal.removeHandler(handler)
    console.print(f"  [green]✓[/green] {time.monotonic() - start:.1f} s")


def _note(name: str, words: str) -> None:
    console.print(f"[bold]{name}[/bold]\n  {words}")


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        for line in record.getMessage().splitlines():
            console.print(f"  {line}", markup=False, soft_wrap=True)


def _show(settings: Settings, user_id: str | None) -> None:
    """Ten recommendations for one person as a table, and where the milliseconds went."""
    from inference.runtime import LarderApplication
    from inference.timing import Steps
    from schemas.serving import RecommendationRequest

    application = LarderApplication.from_settings(settings)
    application.warm()
    with application.store.connection() as connection:
        row = connection.execute(
            "SELECT user_id, count(*) FROM user_history GROUP BY user_id HAVING count(*) >= 20 "
            "ORDER BY max(occurred_at) DESC, user_id LIMIT 1"
        ).fetchone()
        known = (
            user_id
            and connection.execute("SELECT 1 FROM user_history WHERE user_id = %s LIMIT 1", [user_id]).fetchone()
        )
    if user_id and not known:
        console.print(f"person {escape(user_id)} has no events here; this is what somebody new gets", soft_wrap=True)
    chosen = user_id or (row[0] if row else "somebody new")
    request = RecommendationRequest(user_id=chosen, k=10, explain=True)
    for _ in range(3):
        steps = Steps()
        start = time.perf_counter()
        answer = application.recommender.recommend(request, steps=steps)
        total = (time.perf_counter() - start) * 1000
    application.close()
    table = Table(title=f"ten recommendations for person {chosen} (model {answer.model_version})")
    for name in ("item", "title", "score", "why"):
        table.add_column(name, justify="right" if name == "score" else "left", overflow="fold")
    for item in answer.items:
        table.add_row(item.item_id, item.title, f"{item.score:.2f}", "; ".join(item.reasons or ()))
    console.print(table)
    console.print(
        f"answered in {total:.1f} ms: "
        + ", ".join(f"{name} {value:.1f}" for name, value in steps.ms.items())
        + (f"; degraded: {', '.join(answer.degraded)}" if answer.degraded else "")
    )


if __name__ == "__main__":
    # Being told to stop is the same as Ctrl-C: what is finished stays, what is not is rolled back.
    interrupts.listen()
    sys.exit(main())
