"""Intervals, lifts, splits and plans against what is known of them by other means."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from orchestration.compute.experiments.planner import plan, power_with
from orchestration.compute.experiments.ratios import lift_of, moments, person_variance, products
from orchestration.compute.experiments.sequential import half_width, one_sided_width, p_value, tune
from orchestration.compute.experiments.split import judge_split, sequential_p
from schemas.errors import DefinitionError


def people(seed: int, n: int = 4_000, lift: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(clicks, shown, clicks before less what is usual)` of people with habits of their own."""
    rng = np.random.default_rng((900, seed))
    rate = rng.beta(3, 27, n)
    shown, before = 10 * (1 + rng.poisson(3, n)), 10 * rng.poisson(6, n)
    return rng.binomial(shown, rate * (1 + lift)), shown, (rng.binomial(before, rate) - 0.1 * before)[:, None]


def test_an_effect_is_outside_the_interval_exactly_where_its_p_value_is_below_alpha() -> None:
    tau = tune(0.05, 0.01)
    for se in (0.001, 0.01, 0.2):
        edge = float(half_width(se, tau, 0.01))
        assert p_value(edge, se, tau) == pytest.approx(0.01)
        assert p_value(0.99 * edge, se, tau) > 0.01
        assert edge > stats.norm.ppf(0.995) * se


def test_the_interval_is_tightest_where_the_smallest_lift_is_about_to_be_found() -> None:
    tau = tune(0.05)
    errors = np.geomspace(0.001, 0.1, 2_000)
    best = errors[np.argmin(half_width(errors, tau) / errors)]
    # The width in standard errors keeps falling with s; at a given s no other τ makes it narrower.
    tuned = (0.05 - half_width(errors, tau)) / errors
    at = errors[np.argmin(np.abs(tuned - stats.norm.ppf(0.8)))]
    others = [half_width(at, other * tau) for other in (0.5, 0.8, 1.25, 2.0)]
    assert all(half_width(at, tau) < other for other in others)
    assert best > 0


def test_a_one_sided_bound_is_a_crossing_of_the_half_normal_mixture() -> None:
    tau, se, alpha = 0.04, 0.01, 0.05
    width = float(one_sided_width(se, tau, alpha))
    grid = np.linspace(0, 8 * tau, 200_001)
    # The likelihood ratio of an estimate at the bound, mixed over effects of the half-normal distribution.
    ratio = np.exp(width * grid / se**2 - grid**2 / (2 * se**2)) * 2 * stats.norm.pdf(grid, scale=tau)
    evidence = float(np.trapezoid(ratio, grid))
    assert 1 / alpha <= evidence < 1.1 / alpha
    assert stats.norm.ppf(0.95) * se < width < float(half_width(se, tau, alpha))


def test_the_lift_of_a_mean_has_the_standard_error_of_a_t_test() -> None:
    rng = np.random.default_rng(900)
    a, b = rng.gamma(2, 1, 3_000), rng.gamma(2, 1.1, 2_000)
    found = lift_of(moments(a, np.ones_like(a)), moments(b, np.ones_like(b)))
    assert found.lift == pytest.approx(b.mean() / a.mean() - 1)
    log_se = math.sqrt(a.var(ddof=1) / len(a) / a.mean() ** 2 + b.var(ddof=1) / len(b) / b.mean() ** 2)
    assert found.se == pytest.approx(log_se * b.mean() / a.mean())


def test_people_are_the_unit_of_a_ratio() -> None:
    clicks, shown, _ = people(0)
    rng = np.random.default_rng((900, 99))
    both = [(clicks[half], shown[half]) for half in (np.arange(4_000) < 2_000, np.arange(4_000) >= 2_000)]
    found = lift_of(moments(*both[0]), moments(*both[1]))
    lifts = []
    for _ in range(600):
        ratios = []
        for y, x in both:
            drawn = rng.integers(0, len(y), len(y))
            ratios.append(y[drawn].sum() / x[drawn].sum())
        lifts.append(ratios[1] / ratios[0] - 1)
    assert found.se == pytest.approx(np.std(lifts), rel=0.1)
    p = clicks.sum() / shown.sum()
    as_if_independent = math.sqrt(2 * p * (1 - p) / (shown.sum() / 2)) / p
    assert found.se > 1.3 * as_if_independent


def test_cuped_narrows_the_interval_and_moves_nothing() -> None:
    gaps, errors, plain = [], [], []
    for seed in range(150):
        control, treated = people(2 * seed, 1_500), people(2 * seed + 1, 1_500, 0.1)
        with_it = lift_of(moments(*control), moments(*treated))
        without = lift_of(moments(*control[:2]), moments(*treated[:2]))
        gaps.append(float(with_it.lift))
        errors.append(float(with_it.se))
        plain.append(float(without.se))
        assert with_it.plain_se == pytest.approx(without.se)
    assert np.mean(errors) < 0.9 * np.mean(plain)
    assert np.mean(gaps) == pytest.approx(0.1, abs=4 * np.std(gaps) / math.sqrt(len(gaps)))
    # What it says of its own error is what its error is.
    assert np.std(gaps) == pytest.approx(np.mean(errors), rel=0.2)


def test_a_covariate_that_says_nothing_changes_nothing() -> None:
    control, treated = people(1), people(2)
    plain = lift_of(moments(*control[:2]), moments(*treated[:2]))
    for made in (np.zeros((4_000, 1)), np.zeros((4_000, 3)), np.ones((4_000, 2))):
        found = lift_of(moments(*control[:2], made), moments(*treated[:2], made))
        assert found.lift == pytest.approx(plain.lift)
        assert found.se == pytest.approx(plain.se)
    # Nor does one that is there twice.
    twice = [np.repeat(known, 2, axis=1) for known in (control[2], treated[2])]
    once = lift_of(moments(*control), moments(*treated))
    found = lift_of(moments(*control[:2], twice[0]), moments(*treated[:2], twice[1]))
    assert found.se == pytest.approx(once.se, rel=1e-4)


def test_looks_are_what_an_analysis_at_that_moment_gives() -> None:
    control, treated = people(3, 800), people(4, 800)
    looks = lift_of(np.cumsum(products(*control), axis=0), np.cumsum(products(*treated), axis=0))
    for last in (250, 799):
        then = lift_of(
            moments(*(column[: last + 1] for column in control)), moments(*(column[: last + 1] for column in treated))
        )
        assert looks.lift[last] == pytest.approx(then.lift)
        assert looks.se[last] == pytest.approx(then.se)
    assert not looks.ready[:199].any()
    assert looks.ready[-1]


def test_without_control_outcomes_nothing_is_ready() -> None:
    clicks, shown, _ = people(5)
    found = lift_of(moments(0 * clicks, shown), moments(clicks, shown))
    assert not found.ready
    assert math.isnan(float(found.lift))


def test_the_split_is_judged_as_scipy_judges_it_and_by_every_look() -> None:
    found = judge_split([[2_600, 2_400], [51_000, 49_000]], (0.5, 0.5))
    assert found.chi_square_p == pytest.approx(stats.chisquare([51_000, 49_000]).pvalue)
    assert found.broken()
    assert not judge_split([[50_200, 49_800]], (0.5, 0.5)).broken(last_look=True)
    # By chance the fixed test may fall below at one look of many: it counts only where one look was planned.
    unlucky = judge_split([[50_550, 49_450]], (0.5, 0.5))
    assert unlucky.chi_square_p < 0.001
    assert not unlucky.broken()
    assert unlucky.broken(last_look=True)


@pytest.mark.parametrize("people", [(60, 140), (320, 460), (5_300, 4_700), (502_500, 497_500)])
def test_a_mismatch_is_seen_at_every_size(people: tuple[int, int]) -> None:
    assert stats.chisquare(people).pvalue < 1e-6
    assert judge_split([people], (0.5, 0.5)).broken()


def test_uneven_shares_are_no_mismatch() -> None:
    assert sequential_p([90_000, 10_000], (0.9, 0.1)) == 1
    assert judge_split([[85_000, 10_000, 5_000]], (0.85, 0.1, 0.05)).chi_square_p == pytest.approx(1)
    with pytest.raises(DefinitionError, match="share above 0"):
        judge_split([[1, 2]], (1.0, 0.0))


def test_a_plan_gives_the_power_it_says() -> None:
    variance = person_variance(moments(*people(6)))
    made = plan(0.05, variance, people_per_day=400)
    assert power_with(0.05, variance, made.people) == pytest.approx(0.8, abs=1e-3)
    assert power_with(0.05, variance, made.people / 2) < 0.5
    assert made.days == math.ceil(made.people / 400)
    assert plan(0.1, variance).people < made.people / 3
    assert plan(0.05, variance, share=0.1).people > 2 * made.people
    assert "as often as one likes" in made.words()


@pytest.mark.parametrize(
    ("values", "named"),
    [({"lift": 0.0}, "lift is 0"), ({"power": 1.2}, "power is 1.2"), ({"share": 1.0}, "share is 1.0")],
)
def test_a_plan_that_cannot_be_made_says_why(values: dict[str, float], named: str) -> None:
    with pytest.raises(DefinitionError, match=named):
        plan(**({"lift": 0.05, "variance": 1.0} | values))  # type: ignore[arg-type]
