"""`make bench-gpu`: the ranker on an NVIDIA GPU against PyTorch on the same card and against the card's own ceilings.

Answers are checked before anything is timed: every graph must agree with PyTorch in float32 over a sweep of shapes, and
every operator must be placed on the GPU. Then, in one run and as medians:

    request   one request, full history, 500 and 1,000 candidates, numpy in and numpy out, a CUDA graph for each bucket
    batch     many requests at once, item vectors resident on the device: requests per second, and the share of the
              card's ceilings, compared with PyTorch eager and `torch.compile`
    encoding  item texts through the float encoder, compared with sentence-transformers on the same card
    training  one epoch of next-item training on random histories, on the card and on this machine's CPU

ONNX Runtime takes cuBLAS, cuRAND and the CUDA runtime from their wheels; those that are missing are installed first. Where
there is no card it says so and ends with status 2. With `--cpu`, which CI runs, every part goes through the CPU, in small:
that proves the script and the graphs, and measures nothing worth keeping. Weights and histories are random: speed does not
depend on them.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
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
from inference.cuda import PROVIDER, Bucket, CudaSession, device_count
from inference.encoder import TextEncoder
from orchestration.compute.encoder import export_encoder, original_encoder
from orchestration.compute.export import export_fp32, random_inputs, session_runner
from orchestration.compute.folded import fold
from orchestration.compute.half import half
from orchestration.compute.interactions import Interactions
from orchestration.compute.model import Ranker
from orchestration.compute.parity import HALF_TOLERANCE_RATE
from orchestration.compute.train import train
from orchestration.compute.train_config import TrainConfig
from schemas.ranker import MAX_HISTORY, OUTPUTS, SIZES, TEXT_DIM
from schemas.views import candidate_features, context_features
from tests.benchmarks.encoder_speed import FP32_COSINE, catalogue
from tests.rankers import random_ranker

assert orchestration is not None
F, G = len(context_features()), len(candidate_features())
WHEELS = ("nvidia-cublas", "nvidia-curand", "nvidia-cuda-runtime")
"""What ONNX Runtime's CUDA provider needs for transformers, of CUDA 13; not cuDNN."""
CATALOGUE = 20_000
"""Items whose vectors lie on the device for batch scoring."""
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="prove the script on a machine without a GPU")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the dated JSON (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.cpu:
        if device_count() == 0:
            print("the driver shows no NVIDIA GPU; run on a machine with one, or with --cpu", file=sys.stderr)
            return 2
        if not torch.cuda.is_available():
            print(
                f"PyTorch {torch.__version__} cannot use this machine's GPU, and without it there is nothing to compare "
                "with; install a build for CUDA: pip install --force-reinstall torch==2.13.0",
                file=sys.stderr,
            )
            return 2
        install()
    report: dict[str, Any] = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(arguments.cpu)}
    say("machine", report["machine"])
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            ranker = random_ranker(size, F, G)
            path = Path(folder) / f"{size}.onnx"
            export_fp32(fold(ranker) if arguments.cpu else half(ranker), path, f=F, g=G, d=SIZES[size].dim)
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
        report["encoding"] = encoding(Path(folder) / "encoder", cpu=arguments.cpu)
        say("encoding", report["encoding"])
        report["training"] = training(arguments.sizes[-1], cpu=arguments.cpu)
        say("training", report["training"])
    if not arguments.cpu:
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = f"gpu-{report['at'][:10]}-{report['machine']['gpu'].replace(' ', '-').lower()}.json"
        (arguments.out / name).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


def install() -> None:
    """The wheels that are missing here, into this environment."""
    missing = []
    for wheel in WHEELS:
        try:
            importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            missing.append(wheel)
    if missing:
        say("installing", missing)
        # Their versions count as CUDA's do, but for cuRAND, which counts as its library does: 10 in CUDA 12 and 13.
        pinned = [wheel if wheel == "nvidia-curand" else f"{wheel}>=13,<14" for wheel in missing]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pinned]
        subprocess.run(pip, check=True, stdout=sys.stderr)


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
    torch._dynamo.reset()  # what was compiled for other shapes counts against a limit, beyond which code runs eagerly
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
    """`b` requests at once. All inputs lie on the device; candidates are named by number and their vectors fetched there."""
    d = SIZES[ranker.shape.size].dim
    inputs = random_inputs(b, MAX_HISTORY, n, f=F, g=G, d=d, seed=b)
    table = torch.nn.functional.normalize(torch.randn(CATALOGUE, d, generator=torch.Generator().manual_seed(b)), dim=-1)
    numbers = torch.randint(CATALOGUE, (b, n), generator=torch.Generator().manual_seed(b))
    inputs["candidate_vectors"] = table[numbers].numpy()
    reference = expected(ranker, {name: value[:2] for name, value in inputs.items()})[1]
    resident, asked = table.cuda(), numbers.flatten().cuda()
    vectors = torch.empty(b * n, d, device="cuda")
    session = CudaSession(path, [Bucket(b, MAX_HISTORY, n)], addresses={"candidate_vectors": vectors.data_ptr()})
    (bound,) = session._buckets.values()
    bound.feed({name: value for name, value in inputs.items() if name != "candidate_vectors"})

    def score() -> None:
        torch.index_select(resident, 0, asked, out=vectors)
        torch.cuda.synchronize()  # the graph runs on a stream of its own
        bound.launch()

    score()
    if shift(bound.outputs["scores"].numpy()[:2], reference) > HALF_TOLERANCE_RATE:
        raise SystemExit("the batch does not give the scores of its requests")
    work = operations(ranker.shape.size, b, MAX_HISTORY, n)
    moved = traffic(ranker.shape.size, b, MAX_HISTORY, n)
    # No run can be shorter than the longer of the two.
    least_ms = max(work / ceiling["fp16_tflops"], moved / ceiling["copy_tb_per_s"]) / 1e9
    report: dict[str, Any] = {"operations": work, "bytes_at_least": moved, "ceiling_ms": round(least_ms, 4)}

    def note(name: str, ms: float) -> None:
        report[name] = {
            "p50_ms": round(ms, 4),
            "requests_per_s": round(b / ms * 1000, 1),
            "share_of_matrix_rate": round(work / ms / 1e9 / ceiling["fp16_tflops"], 4),
            "times_the_ceiling": round(ms / least_ms, 3),
        }

    note("larder", milliseconds(score, runs=50, warm=10)["p50_ms"])
    whole = CudaSession(path, [Bucket(b, MAX_HISTORY, n)])
    note("larder, numpy to numpy", milliseconds(lambda: whole.run(inputs), runs=20, warm=3)["p50_ms"])
    on_device = {name: torch.from_numpy(value).cuda() for name, value in inputs.items()}
    for name, run in torch_rankers(ranker, "max-autotune-no-cudagraphs"):

        def ask(run: Callable[..., Any] = run) -> Any:
            with torch.inference_mode():
                torch.index_select(resident, 0, asked, out=vectors)
                answer = run(**on_device | {"candidate_vectors": vectors.view(b, n, d)})
            torch.cuda.synchronize()
            return answer

        if shift(ask()[1][:2].float().cpu().numpy(), reference) > 0.1:
            raise SystemExit(f"{name} does not give the same scores; nothing to compare with")
        note(name, milliseconds(ask, runs=50, warm=10)["p50_ms"])
    return report


def traffic(size: str, b: int, h: int, n: int) -> float:
    """Bytes that no arrangement can spare: inputs and outputs in float, weights in half precision, each moved once."""
    d, layers = SIZES[size].dim, SIZES[size].layers
    hidden = 16 * -(-d * 8 // 3 // 16)
    given = b * (2 * F + d + 1 + h * (d + 5) + n * (d + 2 * G) + d + n)
    return 4.0 * given + 2.0 * layers * (4 * d * d + 3 * d * hidden)


def encoding(folder: Path, *, cpu: bool) -> dict[str, Any]:
    """Item texts a second through our float encoder and through sentence-transformers, on the card (or both on the CPU)."""
    texts = catalogue(24 if cpu else 2_000)
    export_encoder(folder)
    ours, theirs = TextEncoder(folder, cuda=not cpu), original_encoder()
    if not cpu:
        theirs = theirs.to("cuda")

    def ask() -> np.ndarray[Any, Any]:
        return np.asarray(theirs.encode(texts, batch_size=256, normalize_embeddings=True, show_progress_bar=False))

    cosine = float((ours.encode(texts) * ask()).sum(axis=1).min())
    if not cosine >= FP32_COSINE:
        raise SystemExit(f"a text's cosine to sentence-transformers is {cosine:.5f}, below {FP32_COSINE}")
    runs = {"runs": 1, "warm": 0} if cpu else {"runs": 10, "warm": 2}
    took = {
        "larder": milliseconds(lambda: ours.encode(texts), **runs)["p50_ms"],
        "sentence-transformers": milliseconds(ask, **runs)["p50_ms"],
    }
    return {"texts": len(texts), "provider": ours.provider, "cosine_min": round(cosine, 6)} | {
        name: {"p50_ms": ms, "texts_per_s": round(len(texts) / ms * 1000, 1)} for name, ms in took.items()
    }


def training(size: str, *, cpu: bool) -> dict[str, Any]:
    """One epoch of stage 1 on random histories, on the card and on the CPU (only there with `cpu`)."""
    people, items, length = (40, 50, 20) if cpu else (2_000, 5_000, 100)
    generator = np.random.default_rng(0)
    n = people * length
    events = Interactions(
        np.array([f"u{number:05}" for number in range(people)]),
        np.array([f"i{number:05}" for number in range(items)]),
        np.repeat(np.arange(people), length).astype(np.int32),
        np.concatenate([generator.permutation(items)[:length] for _ in range(people)]).astype(np.int32),
        np.arange(n, dtype=np.int64) * 60_000_000,
        np.ones(n, np.int64),
        np.full(n, np.nan, np.float32),
    )
    texts = generator.standard_normal((items, TEXT_DIM)).astype(np.float32)
    config = TrainConfig(size=size, epochs=2, slate_epochs=0, validation_labels=50)
    report: dict[str, Any] = {"events": n, "items": items, "size": size}
    for device in ("cpu",) if cpu else ("cuda", "cpu"):
        trained = train(events, texts, config, device=device)
        last = trained.progress[-1]  # the first epoch warms up
        if not np.isfinite(last.loss):
            raise SystemExit(f"the loss on {device} is {last.loss}")
        report[device] = {
            "epoch_seconds": round(last.seconds, 3),
            "events_per_s": round(n / last.seconds),
            "loss": round(last.loss, 4),
        }
    if not cpu and abs(report["cuda"]["loss"] - report["cpu"]["loss"]) > 0.05 * report["cpu"]["loss"]:
        raise SystemExit(f"the card and the CPU end at different losses: {report}")
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
