"""The gate refuses what it cannot measure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from orchestration.compute.evaluate import RankerScorer
from orchestration.compute.export import random_inputs
from orchestration.compute.interactions import Interactions
from orchestration.compute.model import Ranker, RankerShape
from orchestration.compute.parity import Int8Report, check_half, check_int8, check_parity, compare_int8
from orchestration.compute.splits import Queries
from schemas.errors import GateError

GOOD = Int8Report(512, 0.1, 0.1, 0.0, 1.0, 0.0)
ITEMS, DIM = 40, 8


def requests(n: int) -> Queries:
    """`n` people, each with item 0 behind them and the last item of the catalogue to be found."""
    events = Interactions(
        np.array([f"u{number:02}" for number in range(n)], np.str_),
        np.array([f"i{number:02}" for number in range(ITEMS)]),
        np.repeat(np.arange(n), 2).astype(np.int32),
        np.tile([0, ITEMS - 1], n).astype(np.int32),
        np.arange(2 * n, dtype=np.int64) * 60_000_000,
        np.ones(2 * n, np.int64),
        np.full(2 * n, np.nan, np.float32),
    )
    start = 2 * np.arange(n)
    return Queries(events, start + 1, start, start + 1)


def scorer(*, finds: bool = True) -> RankerScorer:
    """Puts the last item, which everybody looks for, first or, unless it `finds`, last."""
    vectors = np.zeros((ITEMS, DIM), np.float32)
    vectors[:, 0] = np.linspace(-1, 1, ITEMS)

    def run(inputs: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        scores = inputs["candidate_vectors"][:, :, 0] * np.float32(1 if finds else -1)
        user = np.zeros((len(scores), DIM), np.float32)
        user[:, 0] = 1
        return user, scores

    return RankerScorer(run, vectors)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("ndcg_loss_rate", "NDCG@10 loss nan%"),
        ("top_10_overlap_rate", "top-10 overlap nan"),
        ("batch_shift_rate", "batch shift nan"),
    ],
)
def test_a_figure_that_is_not_a_number_is_refused(name: str, fault: str) -> None:
    assert check_int8(GOOD) == GOOD
    with pytest.raises(GateError, match=fault):
        check_int8(replace(GOOD, **{name: math.nan}))  # type: ignore[arg-type]  # every changed field is a float


def test_int8_that_ranks_as_float_does_passes() -> None:
    report = check_int8(compare_int8(scorer(), scorer(), requests(6)))
    assert (report.requests, report.ndcg_at_10_fp32, report.ndcg_loss_rate) == (6, 1.0, 0.0)


def test_a_float_graph_that_finds_nothing_is_no_measure() -> None:
    report = compare_int8(scorer(finds=False), scorer(finds=False), requests(6))
    assert math.isnan(report.ndcg_loss_rate)
    with pytest.raises(GateError, match=r"fp32 finds none of 6 labels.*give more requests"):
        check_int8(report)


def test_a_shift_that_is_not_a_number_is_not_passed_over() -> None:
    def shaky(inputs: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        user, scores = scorer().run(inputs)
        alone = len(scores) == 1
        # Of the requests that are answered alone, the last one has no score: a maximum taken one by one would pass over it.
        return user, scores * np.float32(math.nan) if alone and next(turn) == 5 else scores

    turn = iter(range(6))
    report = compare_int8(scorer(), replace(scorer(), run=shaky), requests(6))
    assert math.isnan(report.batch_shift_rate)


def test_no_requests_are_refused_by_number() -> None:
    with pytest.raises(GateError, match="0 requests to be judged on; give one or more"):
        compare_int8(scorer(), scorer(), requests(0))


@pytest.mark.parametrize("said", ["out of memory\nat node 7", ""])
def test_a_failure_of_the_runtime_is_told_with_its_likely_cause_only(said: str) -> None:
    def run(inputs: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        raise RuntimeError(said)

    with pytest.raises(GateError, match=r"b=1, h=1, n=1: (out of memory|RuntimeError\(.*\)); the likely cause"):
        check_parity(Ranker(RankerShape(context_features=1, candidate_features=1)), run, f=1, g=1, d=64)


def test_the_loss_has_an_interval_over_people() -> None:
    def worse(inputs: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        user, scores = scorer().run(inputs)
        # Every second request loses its label to the item before it.
        order = np.arange(len(scores))[:, None] % 2 * (inputs["candidate_vectors"][:, :, 0] == 1)
        return user, scores - np.float32(0.06) * order.astype(np.float32)

    report = compare_int8(scorer(), replace(scorer(), run=worse), requests(40))
    assert report.ndcg_loss_rate == pytest.approx(0.5 * (1 - 1 / math.log2(3)))
    assert 0 < report.ndcg_loss_low < report.ndcg_loss_rate < report.ndcg_loss_high
    same = compare_int8(scorer(), scorer(), requests(40))
    assert (same.ndcg_loss_low, same.ndcg_loss_high) == (0, 0)


def test_half_that_strays_is_refused() -> None:
    ranker = Ranker(RankerShape(context_features=1, candidate_features=1)).eval()

    def run(inputs: dict[str, NDArray[Any]], by: float = 0.0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with torch.no_grad():
            user, scores = ranker(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return user.numpy(), scores.numpy() + np.float32(by) * scores.std(dim=1, keepdim=True).numpy()

    asked = [random_inputs(2, 5, n, f=1, g=1, d=64, seed=n) for n in (9, 17)]
    assert check_half(ranker, run, asked) == 0
    with pytest.raises(GateError, match=r"half precision moves a score by 2\.\d+e-03"):
        check_half(ranker, lambda inputs: run(inputs, 0.00205), asked)
