"""The gate: an exported graph must answer as PyTorch does, and its int8 twin rank as well as the float one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import nn

from orchestration.compute.evaluate import RankerScorer, RunRanker, gain, ranks
from orchestration.compute.export import alone, random_inputs
from orchestration.compute.splits import Queries
from schemas.errors import GateError
from schemas.ranker import MAX_CANDIDATES, MAX_HISTORY, OUTPUTS

FP32_TOLERANCE = 1e-4
INT8_NDCG_LOSS_RATE = 0.01
INT8_TOP_10_OVERLAP_RATE = 0.95
INT8_BATCH_TOLERANCE_RATE = 0.01
"""Of the spread of a request's scores. Static ranges make int8 a function of the request alone, up to the order of a
float sum, which can tip a rounding by one step; dynamic ranges, taken over the whole batch, move scores by 5 %."""
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
    for b, h, n in product(SWEEP, (*SWEEP, MAX_HISTORY), (*SWEEP, MAX_CANDIDATES)):
        if b > 2 and (h == MAX_HISTORY or n == MAX_CANDIDATES):
            continue  # a graph that takes these lengths for one and two requests takes them for more
        inputs = random_inputs(b, h, n, f=f, g=g, d=d, seed=b * 1_000_003 + h * 1009 + n)
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
    """Largest change of a score when its request is answered in a batch instead of alone, over the spread (standard
    deviation) of the request's scores."""


def compare_int8(fp32: RankerScorer, int8: RankerScorer, queries: Queries, *, candidates: int = 200) -> Int8Report:
    """Measure int8 against float on `queries`, each re-ranking the same `candidates` items.

    Raises GateError if there are none.
    """
    if len(queries) == 0:
        raise GateError("int8 has 0 requests to be judged on; give one or more, 512 judge well")
    labels = {}
    for name, scorer in (("fp32", fp32), ("int8", int8)):
        labels[name] = float(gain(ranks(scorer, queries, batch=128), 10).mean())
    overlaps: list[float] = []
    shifts: list[float] = []
    width = min(candidates, len(fp32.item_vectors))
    for begin in range(0, len(queries), 64):
        part = queries.take(slice(begin, begin + 64))
        user, _ = fp32.run(fp32.inputs(part, np.zeros((len(part), 1), np.int32)))
        offered = np.argsort(-(user @ fp32.item_vectors.T), axis=1, kind="stable")[:, :width].astype(np.int32)
        inputs = fp32.inputs(part, offered)
        exact, quantised = fp32.run(inputs)[1], int8.run(inputs)[1]
        for row in range(len(part)):
            best, ours = (set(np.argsort(-scores[row], kind="stable")[:10]) for scores in (exact, quantised))
            overlaps.append(len(best & ours) / len(best))
            single = int8.run(alone(inputs, row))[1][0]
            shifts.append(float(np.abs(single - quantised[row]).max() / max(float(single.std()), 1e-6)))
    loss = 1 - labels["int8"] / labels["fp32"] if labels["fp32"] else math.nan
    # Not Python's max: it passes over NaN.
    return Int8Report(
        len(queries), labels["fp32"], labels["int8"], loss, float(np.mean(overlaps)), float(np.max(shifts))
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
