"""What the benches share: their options, sections in processes of their own, what is kept between runs, the report."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def options(
    about: str | None, sections: tuple[str, ...], peer: str, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """What was asked for, and the sections that are to run."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: proves the bench and its answers, measures nothing"
    )
    parser.add_argument("--only", help=f"comma-separated sections of {', '.join(sections)} (default: all)")
    parser.add_argument(
        "--peers", action="store_true", help=f"measure {peer} too; its environment is made on first use"
    )
    parser.add_argument("--work", type=Path, help="keep what is finished here, and go on from it (default: begin anew)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the dated JSON (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    only = tuple(chosen.only.split(",")) if chosen.only else sections
    if unknown := [name for name in only if name not in sections]:
        parser.error(f"there is no section {unknown[0]!r}; known: {', '.join(sections)}")
    return chosen, only


def elsewhere() -> ProcessPoolExecutor:
    """A fresh process, whose memory is its own."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def apart(name: str, run: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `run` gives in a fresh process."""
    note(f"{name} …")
    with elsewhere() as pool:
        return pool.submit(run, *arguments).result()


def kept(work: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` holds of section `name`; made and put there if it does not."""
    file = work / f"{name}.json"
    if file.exists():
        note(f"{name}: taken from {file}")
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    found = make()
    file.write_text(json.dumps(found))
    return found


def environment(folder: Path, steps: tuple[list[str], ...], say: Callable[[str], None]) -> Path:
    """The Python of a peer's own environment in `folder`, made on first use: what pip is to install, step by step."""
    python = folder / "bin" / "python"
    ready = folder / ".installed"
    if not ready.exists():
        say(f"making {folder} with {', '.join(name for step in steps for name in step)} (a few minutes, once)")
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for step in steps:
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step]
            subprocess.run(pip, check=True, stdout=sys.stderr)
        ready.touch()
    return python


def machine() -> dict[str, Any]:
    """What it runs on."""
    cpu = next(
        (line.split(":")[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    memory = next((line.split()[1] for line in _read("/proc/meminfo") if line.startswith("MemTotal")), "0")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory) / 2**20, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def _read(file: str) -> list[str]:
    path = Path(file)
    return path.read_text().splitlines() if path.exists() else []


def timed(ask: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        ask()
        found.append(time.perf_counter() - began)
    return found


def note(line: str) -> None:
    """Progress, for whoever watches; the last line of standard output is kept for the result."""
    print(f"  {line}", file=sys.stderr, flush=True)


def say(title: str, numbers: Mapping[str, Any]) -> None:
    """Figures of a section as progress."""
    note(f"{title}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items()))


def table(numbers: Mapping[str, float], keys: tuple[str, ...], peer: str, prefix: str) -> None:
    """The figures, and the peer's beside them where there are any: those whose name begins with `prefix`."""
    width = max(len(key) for key in keys)
    for key in keys:
        if key in numbers:
            beside = f"   {peer} {figure(numbers[prefix + key]):>12}" if prefix + key in numbers else ""
            print(f"{key:<{width}} {figure(numbers[key]):>14}{beside}")


def figure(value: float) -> str:
    """A number with four decimals, in powers of ten where those would say nothing."""
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:,.4f}"


def write(out: Path, bench: str, report: Mapping[str, Any]) -> None:
    """The dated file `<bench>-<day>.json` below `out`; that of a quick run is called so."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{bench}-{'quick-' if report['quick'] else ''}{report['at'][:10]}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    note(f"written to {file}")
