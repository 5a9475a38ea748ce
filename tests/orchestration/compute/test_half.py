"""The GPU's half-precision twin: the numbers of the float model, on any machine; and the benchmark script's CPU path."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from rankers import random_ranker

from inference.cuda import Bucket, CudaSession
from orchestration.compute.export import export_fp32, random_inputs
from orchestration.compute.half import half
from schemas.errors import ArtifactError
from schemas.ranker import MAX_HISTORY, SIZES

F, G = 3, 5


@pytest.mark.parametrize("size", SIZES)
def test_half_precision_moves_no_score_by_a_thousandth_of_the_spread(size: str) -> None:
    ranker = random_ranker(size, F, G)
    twin = half(ranker)
    inputs = {
        name: torch.from_numpy(value)
        for name, value in random_inputs(2, MAX_HISTORY, 100, f=F, g=G, d=SIZES[size].dim, seed=3).items()
    }
    with torch.no_grad():
        (user, scores), (half_user, half_scores) = ranker(**inputs), twin(**inputs)
    assert float((scores - half_scores).abs().max() / scores.std(dim=1).min()) <= 1e-3
    assert float((user - half_user).abs().max()) <= 1e-4
    assert {parameter.dtype for parameter in ranker.parameters()} == {torch.float32}, "the original was changed"


def test_a_bucket_pads_history_to_the_left_and_candidates_to_the_right() -> None:
    inputs = random_inputs(2, 3, 4, f=F, g=G, d=8, seed=0)
    bucket = Bucket(4, 5, 6)
    padded = {name: bucket.padded(name, value) for name, value in inputs.items()}
    assert bucket.holds(inputs)
    assert not Bucket(4, 2, 6).holds(inputs)
    assert padded["history_vectors"].shape == (4, 5, 8)
    assert np.array_equal(padded["history_vectors"][:2, 2:], inputs["history_vectors"])
    assert not padded["history_mask"][:, :2].any()
    assert padded["candidate_features"].shape == (4, 6, G)
    assert np.array_equal(padded["candidate_features"][:2, :4], inputs["candidate_features"])
    assert not padded["candidate_mask"][:, 4:].any()
    assert padded["prompt_mask"].shape == (4,)


def test_a_padded_request_scores_as_an_unpadded_one() -> None:
    ranker = random_ranker("small", F, G)
    inputs = random_inputs(1, 3, 4, f=F, g=G, d=SIZES["small"].dim, seed=5)
    padded = {name: Bucket(2, 9, 7).padded(name, value) for name, value in inputs.items()}
    with torch.no_grad():
        one, other = (
            ranker(**{name: torch.from_numpy(value) for name, value in given.items()}) for given in (inputs, padded)
        )
    assert torch.allclose(one[0], other[0][:1], atol=1e-5)
    assert torch.allclose(one[1], other[1][:1, :4], atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_without_a_gpu_the_session_refuses_instead_of_falling_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "ranker.onnx"
    export_fp32(half(random_ranker("small", F, G)), path, f=F, g=G, d=SIZES["small"].dim)
    with pytest.raises(ArtifactError, match="GPU"):
        CudaSession(path, [Bucket(1, 5, 5)])


def test_the_benchmark_script_runs_where_there_is_no_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_gpu", "--cpu", "--sizes", "small"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["small"]["score_shift_rate"]["half"] <= 1e-3
    assert report["encoding"]["provider"] == "CPUExecutionProvider"
    assert report["training"]["cpu"]["events_per_s"] > 0
