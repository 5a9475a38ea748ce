"""The gate: an exported graph must answer as PyTorch does, and its int8 twin rank as well as the float one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orchestration.compute.evaluate import RankerScorer, RunRanker, gain, interval, ranks
from orchestration.compute.export import Inputs, alone, random_inputs
from orchestration.compute.splits import Queries
from schemas.errors import GateError
from schemas.ranker import MAX_CANDIDATES, MAX_HISTORY, OUTPUTS

FP32_TOLERANCE = 1e-4
INT8_NDCG_LOSS_RATE = 0.01
INT8_TOP_10_OVERLAP_RATE = 0.95
HALF_TOLERANCE_RATE = 1e-3
"""Of the spread of a request's scores."""
FP32_SHIFT_RATE = 1e-5
INT8_BATCH_TOLERANCE_RATE = 0.01
"""Both of the spread of a request's scores: by so much a score may move with company, order or padding, see `invariance`.
An answer is the same number by number where its sums are made in the same order (orchestration/compute/folded.py); where
they are not, int8 can tip a rounding by one step. Dynamic ranges, taken over the whole batch, moved scores by 5 %."""
SWEEP = (1, 2, 3, 17)
"""Sizes of every dynamic dimension that the gate tries, besides the maximum."""


def check_parity(
    ranker: nn.Module, run: RunRanker, *, f: int, g: int, d: int, tolerance: float = FP32_TOLERANCE
) -> dict[str, float]:
    """Compare `run` with PyTorch over a sweep of every dynamic dimension, not only at the traced shape.

    Returns the worst absolute difference per output. Raises GateError naming the first shape that fails or differs.
    """
    worst = dict.fromkeys(OUTPUTS, 0.0)
    ranker.eval()
    for (b, h, n), inputs in _sweep(f, g, d):
        with torch.no_grad():
            expected = ranker(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        try:
            answers = run(inputs)
        except Exception as error:  # onnxruntime raises its own types, all of them below Exception
            raise GateError(
                f"the graph fails at b={b}, h={h}, n={n}: {(str(error) or repr(error)).splitlines()[0]}; "
                "the likely cause: a length was baked in when it was traced"
            ) from error
        for name, answer, reference in zip(OUTPUTS, answers, expected, strict=True):
            if answer.shape != tuple(reference.shape):
                raise GateError(
                    f"{name} has shape {answer.shape} at b={b}, h={h}, n={n}, PyTorch {tuple(reference.shape)}"
                )
            difference = float(np.abs(answer - reference.numpy()).max())
            if not difference <= tolerance:  # also true for NaN
                raise GateError(
                    f"{name} differs from PyTorch by {difference:.2e} at b={b}, h={h}, n={n}; at most {tolerance:g} is allowed"
                )
            worst[name] = max(worst[name], difference)
    return worst


def check_cut(whole: RunRanker, parts: RunRanker, *, f: int, g: int, d: int) -> None:
    """Raise GateError unless a graph in two files answers as it does in one, over the same sweep."""
    for (b, h, n), inputs in _sweep(f, g, d):
        for name, answer, expected in zip(OUTPUTS, parts(inputs), whole(inputs), strict=True):
            if not np.abs(answer - expected).max() <= FP32_TOLERANCE:  # also true for NaN
                raise GateError(f"in two files the graph gives another {name} than in one at b={b}, h={h}, n={n}")


def _sweep(f: int, g: int, d: int) -> Iterator[tuple[tuple[int, int, int], Inputs]]:
    """Every size `(b, h, n)` that is tried, with inputs."""
    for b, h, n in product(SWEEP, (*SWEEP, MAX_HISTORY), (*SWEEP, MAX_CANDIDATES)):
        if b > 2 and (h == MAX_HISTORY or n == MAX_CANDIDATES):
            continue  # a graph that takes these lengths for one and two requests takes them for more
        yield (b, h, n), random_inputs(b, h, n, f=f, g=g, d=d, seed=b * 1_000_003 + h * 1009 + n)


def check_half(ranker: nn.Module, run: RunRanker, requests: Sequence[Inputs]) -> float:
    """Compare a half-precision graph with PyTorch in float: the largest difference of a score over its request's spread.

    Raises GateError above `HALF_TOLERANCE_RATE`.
    """
    ranker.eval()
    worst = 0.0
    for inputs in requests:
        with torch.no_grad():
            expected = ranker(**{name: torch.from_numpy(value) for name, value in inputs.items()})[1].numpy()
        spread = np.maximum(expected.std(axis=1, keepdims=True), 1e-6)
        shift = float(np.max(np.abs(run(inputs)[1] - expected) / spread))
        if not shift <= HALF_TOLERANCE_RATE:  # also true for NaN
            raise GateError(
                f"half precision moves a score by {shift:.2e} of its request's spread with {expected.shape[1]} candidates; "
                f"at most {HALF_TOLERANCE_RATE:g} is allowed"
            )
        worst = max(worst, shift)
    return worst


def invariance(run: RunRanker, inputs: Inputs, *, seed: int = 0) -> float:
    """The largest change of a score when its request is not answered alone and as it came, over the request's spread.

    `inputs` are b requests padded to one length, as `RankerScorer.inputs` makes them. Each is answered by itself, without
    padding; then all together; with a longer history's padding and empty candidates behind; with the candidates in
    another order; and with the candidates split, one of them by itself. The spread is the standard deviation of the
    request's scores. NaN if a score is.
    """
    n = inputs["candidate_vectors"].shape[1]
    reference = np.concatenate([run(alone(inputs, row))[1] for row in range(len(inputs["history_mask"]))])  # (b, n)
    order = np.random.default_rng(seed).permutation(n)
    third = -(-n // 3)
    others = (
        run(inputs)[1],
        run(_padded(inputs))[1][:, :n],
        run(_candidates(inputs, order))[1][:, np.argsort(order)],
        np.concatenate(
            [
                run(_candidates(inputs, part))[1]
                for part in (slice(0, 1), slice(1, third), slice(third, n))
                if len(range(*part.indices(n)))
            ],
            axis=1,
        ),
    )
    spread = np.maximum(reference.std(axis=1, keepdims=True), 1e-6)
    # Not Python's max: it passes over NaN.
    return float(np.max([np.abs(other - reference) / spread for other in others]))


def _candidates(inputs: Inputs, chosen: slice | NDArray[np.int64]) -> Inputs:
    return {
        name: np.ascontiguousarray(value[:, chosen]) if name.startswith("candidate_") else value
        for name, value in inputs.items()
    }


def _padded(inputs: Inputs) -> Inputs:
    """The same requests with the longest history's padding to the left and seven empty candidates to the right."""

    def pad(name: str, value: NDArray[Any]) -> NDArray[Any]:
        if name.startswith("history_"):
            width = (MAX_HISTORY - value.shape[1], 0)
        elif name.startswith("candidate_"):
            width = (0, 7)
        else:
            return value
        return np.pad(value, [(0, 0), width, *[(0, 0)] * (value.ndim - 2)])

    return {name: pad(name, value) for name, value in inputs.items()}


def check_invariance(run: RunRanker, inputs: Inputs, *, tolerance: float = FP32_SHIFT_RATE) -> float:
    """`invariance` of a float graph. Raises GateError if it is above `tolerance`."""
    shift = invariance(run, inputs)
    if not shift <= tolerance:  # also true for NaN
        raise GateError(
            f"a score moves by {shift:.2e} of its request's spread with company, order or padding; at most {tolerance:g} is "
            "allowed: look for a sum over keys whose order depends on their number"
        )
    return shift


@dataclass(frozen=True, slots=True)
class Int8Report:
    """What quantisation cost on real requests."""

    requests: int
    ndcg_at_10_fp32: float
    ndcg_at_10_int8: float
    ndcg_loss_rate: float
    """NaN where fp32 has an NDCG@10 of 0: with nothing to lose, nothing is said of int8."""
    top_10_overlap_rate: float
    batch_shift_rate: float
    """See `invariance`."""
    ndcg_loss_low: float = math.nan
    ndcg_loss_high: float = math.nan
    """95 % interval of the loss: bootstrap over people of the paired differences, over fp32's NDCG@10."""


def compare_int8(fp32: RankerScorer, int8: RankerScorer, queries: Queries, *, candidates: int = 200) -> Int8Report:
    """Measure int8 against float on `queries`, each re-ranking the same `candidates` items.

    Raises GateError if there are none.
    """
    if len(queries) == 0:
        raise GateError("int8 has 0 requests to be judged on; give one or more, 512 judge well")
    exact, ours = (gain(ranks(scorer, queries, batch=128), 10) for scorer in (fp32, int8))
    overlaps: list[float] = []
    shifts: list[float] = []
    for begin in range(0, len(queries), 64):
        part = queries.take(slice(begin, begin + 64))
        inputs = fp32.inputs(part, fp32.offered(part, candidates))
        for row in zip(fp32.run(inputs)[1], int8.run(inputs)[1], strict=True):
            best, found = (set(np.argsort(-scores, kind="stable")[:10].tolist()) for scores in row)
            overlaps.append(len(best & found) / len(best))
        shifts.append(invariance(int8.run, inputs))
    whole = float(exact.mean())
    low, high = interval(exact - ours, queries.user) if whole else (math.nan, math.nan)
    return Int8Report(
        requests=len(queries),
        ndcg_at_10_fp32=whole,
        ndcg_at_10_int8=float(ours.mean()),
        ndcg_loss_rate=float((exact - ours).mean()) / whole if whole else math.nan,
        top_10_overlap_rate=float(np.mean(overlaps)),
        batch_shift_rate=float(np.max(shifts)),
        ndcg_loss_low=low / whole if whole else math.nan,
        ndcg_loss_high=high / whole if whole else math.nan,
    )


def check_int8(report: Int8Report) -> Int8Report:
    """Return `report` if int8 is good enough to be served. Raises GateError with every figure that is not."""
    faults = []
    # Each comparison is written so that NaN is a fault.
    if report.ndcg_at_10_fp32 == 0:
        faults.append(
            f"fp32 finds none of {report.requests} labels, so no NDCG@10 loss can be told: give more requests"
        )
    elif not report.ndcg_loss_rate <= INT8_NDCG_LOSS_RATE:
        faults.append(f"NDCG@10 loss {report.ndcg_loss_rate:.2%}, at most {INT8_NDCG_LOSS_RATE:.0%}")
    if not report.top_10_overlap_rate >= INT8_TOP_10_OVERLAP_RATE:
        faults.append(f"top-10 overlap {report.top_10_overlap_rate:.3f}, at least {INT8_TOP_10_OVERLAP_RATE}")
    if not report.batch_shift_rate <= INT8_BATCH_TOLERANCE_RATE:
        faults.append(f"batch shift {report.batch_shift_rate:.4f} of the spread, at most {INT8_BATCH_TOLERANCE_RATE}")
    if faults:
        raise GateError(f"int8 does not pass: {'; '.join(faults)}")
    return report
