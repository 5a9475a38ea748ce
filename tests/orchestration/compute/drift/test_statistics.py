"""Distances and their p-values against scipy, against known values, and against chance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from orchestration.compute.drift.sketches import Counts, Mean, Sketch, counts_of, mean_of, sketch
from orchestration.compute.drift.statistics import chi_square, ks, psi, two_means

RNG = np.random.default_rng(4)


def normal(n: int, mean: float = 0.0) -> Sketch:
    return sketch(RNG.normal(mean, 1, n), n)


def test_the_distance_of_sketches_is_that_of_the_samples() -> None:
    left, right = RNG.normal(0, 1, 900), RNG.gamma(2, 1, 700)
    distance, p = ks(sketch(left, 900), [sketch(right, 700)])
    exact = stats.ks_2samp(left, right, method="asymp")
    assert distance == pytest.approx(exact.statistic, abs=0.011)
    assert p < 1e-30


def test_half_a_sigma_is_as_far_as_theory_says() -> None:
    distance, p = ks(normal(50_000, 0.5), [normal(50_000)])
    assert distance == pytest.approx(2 * stats.norm.cdf(0.25) - 1, abs=0.012)
    assert p < 1e-100
    index, _ = psi(normal(50_000, 0.5), [normal(50_000)])
    assert index == pytest.approx(0.25, abs=0.03)  # less what tenths do not see


def test_missing_values_are_a_distance_too() -> None:
    values = RNG.normal(0, 1, 1_000)
    fewer = np.where(RNG.random(1_000) < 0.3, np.nan, values)
    distance, p = ks(sketch(fewer, 1_000), [sketch(values, 1_000)])
    assert distance == pytest.approx(float(np.isnan(fewer).mean()), abs=0.01)
    assert p < 1e-20
    assert psi(sketch(fewer, 1_000), [sketch(values, 1_000)])[0] > 0.3


def test_all_missing_and_all_equal_are_no_error() -> None:
    nothing, ones = sketch(np.full(200, np.nan), 200), sketch(np.ones(200), 200)
    assert ks(nothing, [nothing]) == (0.0, pytest.approx(1.0))
    assert psi(nothing, [nothing])[0] == pytest.approx(0.0)
    assert ks(nothing, [ones])[0] == pytest.approx(1.0)
    assert ks(ones, [ones, ones])[0] == 0.0


def test_references_count_by_their_size() -> None:
    far = sketch(np.full(100, 5.0), 100)
    distance, _ = ks(normal(5_000), [normal(9_900), far])
    assert distance == pytest.approx(0.01, abs=0.02)


@pytest.mark.parametrize("test", [ks, psi])
def test_chance_alone_gives_small_p_values_no_more_often_than_they_say(test: object) -> None:
    assert callable(test)
    found = np.array([test(normal(300), [normal(300), normal(300)])[1] for _ in range(400)])
    assert (found < 0.05).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert np.median(found) > 0.3


def test_shares_that_moved_are_told_from_those_that_did_not() -> None:
    def drawn(p: list[float]) -> Counts:
        return counts_of([{str(name): 1.0 for name in RNG.choice(3, 5, p=p)} for _ in range(500)])

    same = chi_square(drawn([0.5, 0.3, 0.2]), [drawn([0.5, 0.3, 0.2]), drawn([0.5, 0.3, 0.2])])
    moved = chi_square(drawn([0.2, 0.3, 0.5]), [drawn([0.5, 0.3, 0.2]), drawn([0.5, 0.3, 0.2])])
    assert same[1] > 1e-3
    assert moved[1] < 1e-6
    assert moved[0] > 3 * same[0]


def test_people_with_a_little_of_everything_are_worth_more_than_one_draw() -> None:
    one_each = counts_of([{"a": 1.0} if flag else {"b": 1.0} for flag in RNG.random(400) < 0.5])
    mixed = counts_of([{"a": float(share), "b": 1 - float(share)} for share in RNG.normal(0.5, 0.05, 400)])
    assert one_each.effective == pytest.approx(400, rel=0.02)
    assert mixed.effective > 20 * one_each.effective


def test_a_name_that_is_new_is_a_distance_and_no_division_by_zero() -> None:
    w, p = chi_square(Counts(300, 300, {"a": 0.7, "new": 0.3}), [Counts(300, 300, {"a": 1.0})])
    assert w > 0.3
    assert p < 1e-20


def test_a_mean_is_judged_by_its_error_and_by_how_references_differ() -> None:
    change, p = two_means(Mean(400, 0.15, 0.01), [Mean(400, 0.2, 0.01)] * 4)
    assert change == pytest.approx(-0.25)
    assert p < 1e-4
    restless = [Mean(400, 0.2 + step, 0.01) for step in (-0.06, 0.06, -0.05, 0.05)]
    assert two_means(Mean(400, 0.15, 0.01), restless)[1] > 0.2


def test_a_person_is_one_observation_of_a_mean() -> None:
    values = np.array([1.0] * 98 + [0.0, 0.0])
    found = mean_of(values, ["busy"] * 98 + ["a", "b"])
    assert found.clusters == 3
    assert found.mean == pytest.approx(1 / 3)
    assert mean_of(np.array([1.0]), ["a"]).error == float("inf")
