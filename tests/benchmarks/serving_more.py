"""The function's start, size and telemetry; promotions under load; what nobody would send; everybody's scores made ahead."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.serving_world import QUICK, Sizes, World, body

Say = Callable[[str], None]
Found = dict[str, Any]
ROOT = Path(__file__).parents[2]


def found(numbers: dict[str, float | None], **details: Any) -> Found:
    return {"numbers": numbers, "details": details}


def tests_importable() -> None:
    """Let this process import what the tests share, as pytest does."""
    for folder in ("tests", "tests/inference"):
        if str(ROOT / folder) not in sys.path:
            sys.path.insert(0, str(ROOT / folder))


# ---- the function as it is installed


def installed(say: Say) -> Path:
    """The function's package for this Python, with ONNX Runtime for the CPU; made once below build/, from the index."""
    from infra import package

    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    folder = ROOT / "build" / f"function-{package.key(package.CPU, python, None)}"
    if not folder.exists():
        say(f"making {folder.relative_to(ROOT)} (some minutes, once)")
        partial = Path(tempfile.mkdtemp(prefix="function-", dir=_made(ROOT / "build")))
        package.build(partial, package.CPU, python)
        partial.rename(folder)
    return folder


def size(world: World, work: Path, sizes: Sizes, say: Say) -> Found:
    """Bytes of the function as it is installed, with the model and the encoder that it answers wishes with."""
    from infra import package
    from schemas.manifest import ENCODER_PATH

    home = Path(world.artifacts_url.removeprefix("file://"))
    model = f"models/ranker/{world.version}"
    folder = installed(say)
    with tempfile.TemporaryDirectory() as gathered:
        package.gather(Path(gathered), model, home / model, home / ENCODER_PATH)
        code, baked = package.size_bytes(folder), package.size_bytes(Path(gathered))
    parts = {entry.name: package.size_bytes(entry) for entry in folder.iterdir() if entry.is_dir()}
    largest = dict(sorted(parts.items(), key=lambda part: -part[1])[:8])
    return found(
        {"function_size_bytes": code + baked, "function_code_bytes": code, "function_model_bytes": baked}, parts=largest
    )


def cold(world: World, work: Path, sizes: Sizes, say: Say) -> Found:
    """Fresh processes of that package under the real `awslambdaric`, files in the page cache: until they ask for work, and
    what their first answer takes. The first of them only warms the cache."""
    tests_importable()
    from lambda_runtime_api import running_function  # type: ignore[import-not-found]

    from inference.handlers.aws_lambda import START_SECONDS

    folder = installed(say)
    environment = {
        **world.environment(),
        "LARDER_REQUEST_LOG": "off",
        "PYTHONPATH": f"{folder}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    event = {
        "version": "2.0",
        "rawPath": "/recommendations",
        "rawQueryString": "",
        "headers": {"content-type": "application/json", "authorization": f"Bearer {world.key()}"},
        "requestContext": {"http": {"method": "POST", "path": "/recommendations"}, "stage": "$default"},
        "isBase64Encoded": False,
    }
    # -S: nothing but the package, whatever else is installed here.
    python = (sys.executable, "-S", "-W", "ignore")
    ready, first, second = [], [], []
    for number in range(sizes.starts + 1):
        with running_function("tests.benchmarks.serving_function.handler", environment, python) as api:
            assert api.ready.wait(START_SECONDS + 20), f"it never asked for work: {api.init_errors}"
            took = [_answered(api, {**event, "body": body(world, number * 3 + n).decode()}, world) for n in range(2)]
        if number:
            ready.append(api.ready_seconds * 1e3)
            first.append(took[0])
            second.append(took[1])
    return found(
        {
            "cold_start_ready_ms": float(np.median(ready)),
            "cold_start_first_answer_ms": float(np.median(first)),
            "cold_start_second_answer_ms": float(np.median(second)),
        },
        ready_ms=ready,
        first_ms=first,
        imports=_imports(python, environment),
    )


def _answered(api: Any, event: dict[str, Any], world: World) -> float:
    """Milliseconds until the function answered in full."""
    began = time.perf_counter()
    answer = json.loads(api.invoke(event))
    took = (time.perf_counter() - began) * 1e3
    assert answer["statusCode"] == 200, answer
    document = json.loads(answer["body"])
    assert document["degraded"] == [], document["degraded"]
    assert document["model_version"] == world.version
    assert len(document["items"]) == 10
    return took


def _imports(python: tuple[str, ...], environment: dict[str, str]) -> dict[str, float]:
    """Milliseconds of the slowest imports of the function, each with what it imports; read as -X importtime tells them."""
    command = [
        *python,
        "-X",
        "importtime",
        "-c",
        "import tests.benchmarks.serving_function, inference.runtime, awslambdaric",
    ]
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stderr
    lines = re.findall(r"import time:\s+\d+ \|\s+(\d+) \| +(\S+)", told)
    slowest = sorted(((int(us) / 1e3, name) for us, name in lines), reverse=True)[:25]
    return {name: ms for ms, name in slowest}


# ---- telemetry


def telemetry(world: World, work: Path, sizes: Sizes, say: Say) -> Found:
    """Requests with telemetry and without, by turns, in one process; spans and metrics go to a real receiver in another."""
    from tests.benchmarks import telemetry_overhead

    report = telemetry_overhead.measure(world, rounds=sizes.turns, block=sizes.block)
    return found({"telemetry_overhead_rate": report["telemetry_overhead_rate"]}, **report)


# ---- on small worlds of the deployment's own views


@contextmanager
def _released(world: World, work: Path) -> Iterator[Any]:
    """Two releases of 40 items in a database of their own, on the bench's server."""
    tests_importable()
    import psycopg
    from released import released  # type: ignore[import-not-found]

    from infra import postgres
    from infra.feature_tables import ensure_view_tables

    head, _, options = world.url.partition("?")
    server = f"{head.rsplit('/', 1)[0]}/postgres?{options}"
    template = "larder_bench_small"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {template} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {template}")
    url = f"{head.rsplit('/', 1)[0]}/{template}?{options}"
    postgres.migrate(url)
    ensure_view_tables(url)
    with tempfile.TemporaryDirectory(dir=work) as folder, released(server, template, Path(folder)) as made:
        yield made
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {template} WITH (FORCE)")


def promotions(world: World, work: Path, sizes: Sizes, say: Say) -> Found:
    """The alias moved back and forth while eight callers ask: errors, and answers that are not wholly of one version."""
    with _released(world, work) as made:
        from flips import flips_under_load, make  # type: ignore[import-not-found]

        app = make(made)
        try:
            seen, faults = flips_under_load(app, made, sizes.flips, callers=sizes.clients)
        finally:
            app.close()
    assert min(seen.values()) > 0, f"only one version ever answered: {seen}"
    return found(
        {"promotions_under_load_errors": len(faults), "promotions": sizes.flips},
        answers=seen,
        faults=[str(fault) for fault in faults[:10]],
    )


def fuzz(world: World, work: Path, sizes: Sizes, say: Say) -> Found:
    """What nobody would send, through each door: errors, the slowest answer, and the slope of memory."""
    with _released(world, work) as made:
        from fuzz_doors import DOORS  # type: ignore[import-not-found]
        from fuzz_process import fuzz_apart  # type: ignore[import-not-found]
        from worlds import key_header  # type: ignore[import-not-found]

        key = key_header(made.url, per_minute=1_000_000)
        reports = {}
        for door in DOORS:
            say(f"{sizes.fuzz_warm_up + sizes.fuzzed:,} requests to {door}")
            reports[door] = fuzz_apart(
                door,
                made.url,
                made.artifacts_url,
                key,
                seed=7,
                requests=sizes.fuzzed,
                warm_up=sizes.fuzz_warm_up,
            )
    return found(
        {
            "fuzz_errors": sum(report.errors for report in reports.values()),
            "fuzz_memory_slope_bytes_per_request": max(report.slope_bytes_per_request for report in reports.values()),
            "fuzz_slowest_seconds": max(report.slowest_seconds for report in reports.values()),
        },
        **{
            door: {
                "requests": report.requests,
                "statuses": report.statuses,
                "faults": report.faults,
                "slope_bytes_per_request": report.slope_bytes_per_request,
            }
            for door, report in reports.items()
        },
    )


def scores(world: World, work: Path, sizes: Sizes, say: Say) -> Found:
    """People whom `make score-all` scores per second, in a world of its own."""
    from tests.benchmarks import score_all

    report = score_all.main(["--quick"] if sizes == QUICK else [])
    return found({"score_all_users_per_s": report["score_all_users_per_s"]}, **report)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
