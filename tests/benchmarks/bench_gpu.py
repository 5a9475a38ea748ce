"""`make bench-gpu`: the ranker on an NVIDIA GPU against PyTorch on the same card and against the card's own ceilings.

Answers are checked before anything is timed: every graph must agree with PyTorch in float32 over a sweep of shapes, and
every operator must be placed on the GPU. Then, in one run and as medians:

    request   one request, full history, 500 and 1,000 candidates, numpy in and numpy out
    batch     many requests at once, inputs on the device: requests per second, and the share of the card's ceilings
    training  one epoch of next-item training on a simulated world

Without a GPU (`--cpu`, which CI runs) the same graphs go through ONNX Runtime's CPU provider, in small: that proves the
script and the graphs, and measures nothing worth keeping. The weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import orchestration  # first: it sets how OpenMP waits
from inference.cuda import PROVIDER, Bucket, CudaSession
from orchestration.compute.export import export_fp32, random_inputs, session_runner
from orchestration.compute.half import half
from orchestration.compute.model import Ranker
from schemas.ranker import MAX_HISTORY, OUTPUTS, SIZES
from schemas.views import candidate_features, context_features
from tests.rankers import random_ranker

assert orchestration is not None
F, G = len(context_features()), len(candidate_features())
HALF_TOLERANCE_RATE = 1e-3
"""Of the spread (standard deviation) of a request's scores."""
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="prove the script on a machine without a GPU")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the dated JSON (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.cpu and not torch.cuda.is_available():
        print(
            "no CUDA device is visible to PyTorch; run on a machine with an NVIDIA GPU, or with --cpu", file=sys.stderr
        )
        return 2
    report: dict[str, Any] = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(arguments.cpu)}
    say("machine", report["machine"])
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            ranker = random_ranker(size, F, G)
            path = Path(folder) / f"{size}.onnx"
            export_fp32(ranker if arguments.cpu else half(ranker), path, f=F, g=G, d=SIZES[size].dim)
            if arguments.cpu:
                report[size] = on_cpu(ranker, path)
            else:
                report[size] = {
                    "parity": parity(ranker, path),
                    "request": {str(n): request(ranker, path, n) for n in (500, 1000)},
                }
            say(size, report[size])
        if not arguments.cpu:
            report["ceilings"] = ceilings()
            say("ceilings", report["ceilings"])
            size = arguments.sizes[-1]
            ranker, path = random_ranker(size, F, G), Path(folder) / f"{size}.onnx"
            report["batch"] = {"size": size} | {
                f"b={b}, n={n}": batch(ranker, path, b, n, report["ceilings"]) for b, n in ((16, 1000), (64, 500))
            }
            say("batch", report["batch"])
    if not arguments.cpu:
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = f"gpu-{report['at'][:10]}-{report['machine']['gpu'].replace(' ', '-').lower()}.json"
        (arguments.out / name).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


def say(title: str, value: object) -> None:
    print(f"--- {title}\n{json.dumps(value, indent=1)}", file=sys.stderr, flush=True)


def machine(cpu: bool) -> dict[str, Any]:
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "cores": os.cpu_count(),
    }
    if not cpu:
        card = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()[0]  # fmt: skip
        name, memory, driver = (part.strip() for part in card.split(","))
        about |= {"gpu": name, "gpu_memory": memory, "driver": driver, "cuda": torch.version.cuda}
    return about


def shift(answer: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    """The largest difference of a score over the spread of its request's scores."""
    return float((np.abs(answer - reference).max(axis=1) / np.maximum(reference.std(axis=1), 1e-6)).max())


def expected(ranker: Ranker, inputs: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    with torch.no_grad():
        return [part.numpy() for part in ranker(**{name: torch.from_numpy(value) for name, value in inputs.items()})]


def parity(ranker: Ranker, path: Path) -> dict[str, Any]:
    """The graph on the GPU against PyTorch in float32 on the CPU, unpadded and padded into a bucket."""
    d = SIZES[ranker.shape.size].dim
    session = CudaSession(path, [Bucket(1, 1, 1), Bucket(2, 17, 64), Bucket(2, MAX_HISTORY, 1000)])
    placements = session.placements()
    if set(placements) != {PROVIDER}:
        raise SystemExit(f"operators are placed on {placements}; all must be on {PROVIDER}")
    worst_user = worst_score = 0.0
    for b, h, n in (
        (1, 1, 1),
        (1, 2, 3),
        (2, 17, 64),
        (1, 3, 17),
        (2, 17, 500),
        (1, MAX_HISTORY, 17),
        (2, MAX_HISTORY, 1000),
    ):
        inputs = random_inputs(b, h, n, f=F, g=G, d=d, seed=b * 1_000_003 + h * 1009 + n)
        user, scores = session.run(inputs)
        reference = expected(ranker, inputs)
        worst_user = max(worst_user, float(np.abs(user - reference[0]).max()))
        if n > 2:  # one candidate has no spread
            worst_score = max(worst_score, shift(scores, reference[1]))
    if not worst_score <= HALF_TOLERANCE_RATE:  # also true for NaN
        raise SystemExit(
            f"scores differ from PyTorch by {worst_score:.2e} of their spread; at most {HALF_TOLERANCE_RATE:g}"
        )
    return {"user_vector_max_difference": worst_user, "score_shift_rate": worst_score, "operators": placements}


def milliseconds(run: Callable[[], object], *, runs: int = 200, warm: int = 20) -> dict[str, float]:
    for _ in range(warm):
        run()
    gc.collect()
    took = []
    for _ in range(runs):
        began = time.perf_counter()
        run()
        took.append((time.perf_counter() - began) * 1000)
    return {"p50_ms": round(float(np.quantile(took, 0.5)), 4), "p99_ms": round(float(np.quantile(took, 0.99)), 4)}


def request(ranker: Ranker, path: Path, n: int) -> dict[str, Any]:
    """One request with a full history and `n` candidates, numpy to numpy."""
    d = SIZES[ranker.shape.size].dim
    inputs = random_inputs(1, MAX_HISTORY, n, f=F, g=G, d=d, seed=n)
    reference = expected(ranker, inputs)[1]
    session = CudaSession(path, [Bucket(1, MAX_HISTORY, n)])
    (bound,) = session._buckets.values()
    report: dict[str, Any] = {
        "larder": milliseconds(lambda: session.run(inputs)),
        "larder, inputs on the device": milliseconds(bound.launch),
    }
    for name, run in torch_rankers(ranker, "reduce-overhead"):

        def ask(run: Callable[..., Any] = run) -> Any:
            with torch.inference_mode():
                answer = run(**{key: torch.from_numpy(value).cuda() for key, value in inputs.items()})
                return [part.float().cpu().numpy() for part in answer]

        if shift(ask()[1], reference) > 0.1:
            raise SystemExit(f"{name} does not give the same scores; nothing to compare with")
        report[name] = milliseconds(ask)
    return report


def torch_rankers(ranker: Ranker, mode: str) -> list[tuple[str, Callable[..., Any]]]:
    """What the graph competes with: PyTorch under fp16 autocast, eager and compiled, and our half blocks compiled."""
    model = random_ranker(ranker.shape.size, F, G).cuda()
    ours = half(ranker).cuda()

    def autocast(run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(**inputs: Any) -> Any:
            with torch.autocast("cuda", torch.float16):
                return run(**inputs)

        return wrapped

    return [
        ("torch eager fp16", autocast(model)),
        ("torch.compile fp16", autocast(torch.compile(model, mode=mode, dynamic=False))),
        ("torch.compile of the same half blocks", torch.compile(ours, mode=mode, dynamic=False)),
    ]


def ceilings() -> dict[str, float]:
    """What this card does at best: fp16 matrix products and copies in memory."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    product = device_ms(lambda: a @ b)
    copy = device_ms(lambda: target.copy_(source))
    return {"fp16_tflops": 2 * 8192**3 / product / 1e9, "copy_tb_per_s": 2 * (1 << 30) / copy / 1e9}


def device_ms(run: Callable[[], object], *, runs: int = 30, warm: int = 10) -> float:
    """Median time on the device."""
    for _ in range(warm):
        run()
    took = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        run()
        end.record()  # type: ignore[no-untyped-call]
        end.synchronize()  # type: ignore[no-untyped-call]
        took.append(begin.elapsed_time(end))  # type: ignore[no-untyped-call]
    return float(np.median(took))


def operations(size: str, b: int, h: int, n: int) -> float:
    """Multiplications and additions of the matrix products in the blocks."""
    d, layers = SIZES[size].dim, SIZES[size].layers
    hidden = 16 * -(-d * 8 // 3 // 16)
    tokens, prefix = 2 + h + n, 2 + h
    return 2.0 * b * layers * (tokens * (4 * d * d + 3 * d * hidden) + 2 * tokens * prefix * d)


def batch(ranker: Ranker, path: Path, b: int, n: int, ceiling: dict[str, float]) -> dict[str, Any]:
    """`b` requests at once, inputs on the device."""
    d = SIZES[ranker.shape.size].dim
    inputs = random_inputs(b, MAX_HISTORY, n, f=F, g=G, d=d, seed=b)
    reference = expected(ranker, {name: value[:2] for name, value in inputs.items()})[1]
    session = CudaSession(path, [Bucket(b, MAX_HISTORY, n)])
    if shift(session.run(inputs)[1][:2], reference) > HALF_TOLERANCE_RATE:
        raise SystemExit("the batch does not give the scores of its requests")
    (bound,) = session._buckets.values()
    work = operations(ranker.shape.size, b, MAX_HISTORY, n)
    report: dict[str, Any] = {"operations": work}

    def note(name: str, ms: float) -> None:
        report[name] = {
            "p50_ms": round(ms, 4),
            "requests_per_s": round(b / ms * 1000, 1),
            "share_of_matrix_rate": round(work / ms / 1e9 / ceiling["fp16_tflops"], 4),
        }

    note("larder", milliseconds(bound.launch, runs=50, warm=10)["p50_ms"])
    note("larder, numpy to numpy", milliseconds(lambda: session.run(inputs), runs=20, warm=3)["p50_ms"])
    on_device = {name: torch.from_numpy(value).cuda() for name, value in inputs.items()}
    for name, run in torch_rankers(ranker, "max-autotune-no-cudagraphs"):

        def ask(run: Callable[..., Any] = run) -> Any:
            with torch.inference_mode():
                answer = run(**on_device)
            torch.cuda.synchronize()
            return answer

        if shift(ask()[1][:2].float().cpu().numpy(), reference) > 0.1:
            raise SystemExit(f"{name} does not give the same scores; nothing to compare with")
        note(name, milliseconds(ask, runs=50, warm=10)["p50_ms"])
    return report


def on_cpu(ranker: Ranker, path: Path) -> dict[str, Any]:
    """The float graph and the half blocks on the CPU: agreement, and one timing that is not a result."""
    d = SIZES[ranker.shape.size].dim
    run, blocks = session_runner(path), half(ranker)
    worst = {"graph": 0.0, "half": 0.0}
    for b, h, n in ((1, 1, 3), (2, 17, 64)):
        inputs = random_inputs(b, h, n, f=F, g=G, d=d, seed=n)
        reference = expected(ranker, inputs)[1]
        worst["graph"] = max(worst["graph"], shift(run(inputs)[1], reference))
        worst["half"] = max(worst["half"], shift(expected(blocks, inputs)[1], reference))
    if not (worst["graph"] <= 1e-4 and worst["half"] <= HALF_TOLERANCE_RATE):
        raise SystemExit(f"the graphs differ from PyTorch by {worst} of the spread of scores")
    inputs = random_inputs(1, 17, 64, f=F, g=G, d=d, seed=0)
    return {
        "score_shift_rate": worst,
        "outputs": list(OUTPUTS),
        "request": milliseconds(lambda: run(inputs), runs=5, warm=1),
    }


if __name__ == "__main__":
    sys.exit(main())
