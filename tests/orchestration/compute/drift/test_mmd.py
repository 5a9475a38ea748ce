"""The discrepancy against its definition, against chance, against a shift; and that its memory stays bounded."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestration.compute.drift.judge import ALARM, QUIET, WAITING
from orchestration.compute.drift.mmd import median_distance, mmd
from orchestration.compute.drift.vectors import compare_vectors

RNG = np.random.default_rng(8)


def vectors(n: int, d: int = 16, shift: float = 0.0) -> NDArray[np.float32]:
    found = RNG.standard_normal((n, d)).astype(np.float32)
    found[:, 0] += shift
    return found


def by_definition(left: NDArray[np.float32], right: NDArray[np.float32], width: float) -> float:
    def kernel(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.exp(-((a[:, None].astype(float) - b[None]) ** 2).sum(-1) / (2 * width**2))

    n, m = len(left), len(right)
    within = (kernel(left, left).sum() - n) / (n * (n - 1)) + (kernel(right, right).sum() - m) / (m * (m - 1))
    return float(within - 2 * kernel(left, right).mean())


@pytest.mark.parametrize("block_rows", [7, 64, 1_000])
def test_it_is_the_sum_it_is_defined_as_in_blocks_of_any_size(block_rows: int) -> None:
    left, right = vectors(40), vectors(61, shift=1.0)
    found = mmd(left, right, width=3.0, permutations=20, block_rows=block_rows)
    assert found.squared == pytest.approx(by_definition(left, right, 3.0), abs=1e-5)


def test_chance_alone_gives_small_p_values_no_more_often_than_they_say() -> None:
    found = np.array([mmd(vectors(60), vectors(80), permutations=100, seed=seed).p for seed in range(150)])
    assert (found <= 0.05).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 150)
    assert 0.35 < np.median(found) < 0.65


def test_a_p_value_beyond_the_permutations_goes_on_falling() -> None:
    near = mmd(vectors(300), vectors(300, shift=0.8), permutations=100)
    far = mmd(vectors(300), vectors(300, shift=2.0), permutations=100)
    assert far.p < near.p < 1 / 101
    assert far.p < 1e-8


def test_vectors_that_are_all_the_same_have_a_width() -> None:
    assert median_distance(np.ones((5, 3), np.float32)) == 1.0


def test_too_few_vectors_are_named() -> None:
    with pytest.raises(ValueError, match="1 and 9 vectors are too few"):
        mmd(vectors(1), vectors(9))


def test_memory_grows_with_the_sample_and_not_with_its_square() -> None:
    left, right = vectors(3_000), vectors(3_000)
    tracemalloc.start()
    mmd(left, right, permutations=50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 70e6 < 6_000**2 * 4 / 2  # half of the kernel's matrix in float32


def test_a_week_of_another_taste_alarms_and_one_of_the_same_does_not() -> None:
    before = [vectors(300) for _ in range(4)]
    same = compare_vectors("taken", vectors(300), before, 1e-4)
    moved = compare_vectors("taken", vectors(300, shift=1.0), before, 1e-4)
    assert (same.state, moved.state) == (QUIET, ALARM)
    assert compare_vectors("taken", vectors(30), before, 1e-4).state == WAITING
    assert "2 are needed" not in compare_vectors("taken", vectors(300), before, 1e-4).words
    assert compare_vectors("taken", vectors(300), before[:1], 1e-4).state == WAITING
