"""How long the ranker takes to score one request on the CPU: int8 and float, 500 and 1,000 candidates, a history of 100.

The weights are random: speed does not depend on them. The answers are checked before anything is timed. Run by itself:
`python -m tests.benchmarks.ranker_speed [small standard …]`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import orchestration  # first: it sets how OpenMP waits
from inference.ranker import CpuEngine
from orchestration.compute.export import export_fp32, quantise, random_inputs
from orchestration.compute.folded import fold
from orchestration.compute.parity import (
    FP32_SHIFT_RATE,
    FP32_TOLERANCE,
    INT8_BATCH_TOLERANCE_RATE,
    invariance,
)
from schemas.ranker import SIZES
from schemas.views import candidate_features, context_features
from tests.rankers import random_ranker

assert orchestration is not None
F, G = len(context_features()), len(candidate_features())
HISTORY = 100
CANDIDATES = (500, 1000)
THREADS = 2


def scoring(size: str, *, threads: int = THREADS, runs: int = 200) -> dict[str, Any]:
    """Medians in ms by precision and number of candidates, the int8 file's size, and how far company moves a score.

    Raises SystemExit if a graph does not answer as PyTorch does, or moves a score by more than is declared.
    """
    ranker, d = random_ranker(size, F, G), SIZES[size].dim
    with tempfile.TemporaryDirectory() as folder:
        files = {precision: Path(folder) / f"{precision}.onnx" for precision in ("fp32", "int8")}
        export_fp32(fold(ranker), files["fp32"], f=F, g=G, d=d)
        lengths = np.random.default_rng(0).integers(1, 200, 64)
        requests = [random_inputs(1, int(h), 64, f=F, g=G, d=d, seed=int(h)) for h in lengths]
        quantise(files["fp32"], files["int8"], requests)
        engines = {precision: CpuEngine(file, threads) for precision, file in files.items()}
        report: dict[str, Any] = {"size": size, "threads": min(threads, os.cpu_count() or 1)}
        report |= _checked(ranker, engines)
        report["int8_size_bytes"] = files["int8"].stat().st_size
        asked = {n: random_inputs(1, HISTORY, n, f=F, g=G, d=d, seed=n) for n in CANDIDATES}
        # One after the other within each round: whatever else the machine does meets all of them.
        took = _rounds(
            {
                f"{precision}_score_{n}": partial(engine.run, inputs)
                for precision, engine in engines.items()
                for n, inputs in asked.items()
            },
            runs,
        )
    for name, seconds in took.items():
        report[f"{name}_p50_ms"] = round(float(np.median(seconds)) * 1000, 3)
    report["int8_1000_over_500"] = round(report["int8_score_1000_p50_ms"] / report["int8_score_500_p50_ms"], 3)
    report["int8_over_fp32_500"] = round(report["int8_score_500_p50_ms"] / report["fp32_score_500_p50_ms"], 3)
    return report


def _checked(ranker: Any, engines: dict[str, CpuEngine]) -> dict[str, float]:
    size, d = ranker.shape.size, SIZES[ranker.shape.size].dim
    inputs = random_inputs(4, HISTORY, 150, f=F, g=G, d=d, seed=9)
    with torch.no_grad():
        exact = ranker(**{name: torch.from_numpy(value) for name, value in inputs.items()})[1].numpy()
    spread = exact.std(axis=1, keepdims=True)
    float_difference = float(np.abs(engines["fp32"].run(inputs)[1] - exact).max())
    if not float_difference <= FP32_TOLERANCE:
        raise SystemExit(f"{size}: the float graph differs from PyTorch by {float_difference:.2e}: nothing to time")
    int8_difference = float((np.abs(engines["int8"].run(inputs)[1] - exact) / spread).max())
    if not int8_difference <= 0.5:
        raise SystemExit(f"{size}: int8 differs from PyTorch by {int8_difference:.2f} of the spread: nothing to time")
    shifts = {precision: invariance(engine.run, inputs) for precision, engine in engines.items()}
    for precision, most in (("fp32", FP32_SHIFT_RATE), ("int8", INT8_BATCH_TOLERANCE_RATE)):
        if not shifts[precision] <= most:
            raise SystemExit(f"{size}: company moves a score of {precision} by {shifts[precision]:.1e} of its spread")
    return {"batch_invariance_max_shift": shifts["int8"], "fp32_batch_invariance_max_shift": shifts["fp32"]}


def _rounds(calls: dict[str, Callable[[], Any]], runs: int, warm: int = 20) -> dict[str, list[float]]:
    """Seconds of each of `runs` calls, a call of each in every round."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for number in range(warm + runs):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number >= warm:
                took[name].append(time.perf_counter() - began)
    return took


def main() -> int:
    for size in sys.argv[1:] or ("small", "standard"):
        print(json.dumps(scoring(size)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
