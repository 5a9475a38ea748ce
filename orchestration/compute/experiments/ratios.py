"""The lift of a ratio metric between two arms, with the person as the unit.

A metric is Σ numerators / Σ denominators over people. Shown items of one person are not independent, so their number is no
sample size: the delta method over people gives the standard error (Deng, Knoblich & Lu 2018). What is known of people from
before the experiment takes variance away without bias (CUPED; Deng, Xu, Kohavi & Walker 2013), applied to the linearised
ratio, so it serves ratios as well as means.

Everything is computed from sums over people of products of two columns, so that thousands of looks cost one cumulative sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_ONE, _NUMERATOR, _DENOMINATOR, _COVARIATES = 0, 1, 2, 3

FIRST_LOOK_PEOPLE = 200
"""In each arm before anything is concluded: intervals that rest on a central limit need a start (Bibaut, Kallus & Lindon 2022)."""
CONTROL_ERROR_RATE = 0.1
"""And control's ratio must be known to 10 % of itself, or a lift divides by what may be anything."""


@dataclass(frozen=True, slots=True)
class Lift:
    """Of an arm against control, one entry per look, `(…,)` each; NaN where control has nothing to divide by.

    `lift` is relative: 0.05 is 5 % more. `se` is its standard error, `plain_se` the same without CUPED. `control` and
    `treated` are the ratios themselves, `control_se` the error of control's; `people` is the smaller arm's count.
    """

    control: Array
    treated: Array
    control_se: Array
    lift: Array
    se: Array
    plain_se: Array
    people: Array

    @property
    def variance_left(self) -> Array:
        """Share of the variance that CUPED left, 1 where it took none; NaN where there is none."""
        return np.divide(self.se, self.plain_se, out=np.full_like(self.se, np.nan), where=self.plain_se > 0) ** 2

    @property
    def ready(self) -> NDArray[np.bool_]:
        """Where enough is known for a conclusion."""
        with np.errstate(invalid="ignore"):
            known = self.control_se <= CONTROL_ERROR_RATE * self.control
            return np.asarray((self.people >= FIRST_LOOK_PEOPLE) & known & np.isfinite(self.lift) & (self.se > 0))


def products(numerator: ArrayLike, denominator: ArrayLike, covariates: ArrayLike | None = None) -> Array:
    """`(…, n, m, m)`: for each person, the products of any two of 1, numerator, denominator and the k covariates.

    `numerator` and `denominator` are `(…, n)`, `covariates (…, n, k)`; m = 3 + k.
    """
    columns = _columns(numerator, denominator, covariates)
    return np.asarray(columns[..., :, None] * columns[..., None, :])


def moments(numerator: ArrayLike, denominator: ArrayLike, covariates: ArrayLike | None = None) -> Array:
    """`(…, m, m)`: `products` summed over people."""
    columns = _columns(numerator, denominator, covariates)
    return np.asarray(np.swapaxes(columns, -1, -2) @ columns)


def lift_of(control: Array, treated: Array) -> Lift:
    """The lift from the moments `(…, m, m)` of both arms; people not yet in an arm have rows of zeros, the one included."""
    arms = [_Arm(np.asarray(sums, np.float64)) for sums in (control, treated)]
    slopes = _slopes(arms)
    pooled = sum(arm.covariate_sums for arm in arms) / np.maximum(sum(arm.n for arm in arms), 1)[..., None]
    adjusted = [arm.ratio - arm.shift(slopes, pooled) for arm in arms]
    plain = [arm.variance(None) for arm in arms]
    reduced = [arm.variance(slopes) for arm in arms]
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = adjusted[1] / adjusted[0]
        base = np.where(adjusted[0] > 0, adjusted[0], np.nan)
        se = np.sqrt(reduced[1] + growth**2 * reduced[0]) / base
        plain_growth = arms[1].ratio / arms[0].ratio
        plain_se = np.sqrt(plain[1] + plain_growth**2 * plain[0]) / arms[0].ratio
        lift = np.where(adjusted[0] > 0, growth - 1, np.nan)
    return Lift(
        np.asarray(adjusted[0]),
        np.asarray(adjusted[1]),
        np.sqrt(reduced[0]),
        np.asarray(lift),
        np.asarray(se),
        np.asarray(plain_se),
        np.minimum(arms[0].n, arms[1].n),
    )


def person_variance(sums: Array) -> float:
    """Variance over people of one person's share in the relative error of one arm's ratio: a planner's input.

    `sums (m, m)` are the arm's moments; the error of its ratio, relative to the ratio, is √(this / people).
    """
    arm = _Arm(np.asarray(sums, np.float64))
    slopes = _slopes([arm])
    return float(arm.variance(slopes) * arm.n / arm.ratio**2)


class _Arm:
    """Means and covariances of one arm at each look."""

    def __init__(self, sums: Array) -> None:
        self.n = sums[..., _ONE, _ONE]
        with np.errstate(divide="ignore", invalid="ignore"):
            means = sums[..., _ONE, :] / self.n[..., None]
            spread = sums / self.n[..., None, None] - means[..., :, None] * means[..., None, :]
            # n − 1: the same as the usual estimate for a plain mean.
            self._covariance = spread * (self.n / np.maximum(self.n - 1, 1))[..., None, None]
            self.ratio = means[..., _NUMERATOR] / means[..., _DENOMINATOR]
        self._means = means
        self.covariate_sums = sums[..., _ONE, _COVARIATES:]

    @property
    def covariates(self) -> Array:
        """`(…, k, k)`: their covariance."""
        return np.asarray(self._covariance[..., _COVARIATES:, _COVARIATES:])

    @property
    def with_ratio(self) -> Array:
        """`(…, k)`: the covariance of each with the linearised ratio."""
        across = self._covariance[..., _COVARIATES:, :]
        return np.asarray(
            (across[..., _NUMERATOR] - self.ratio[..., None] * across[..., _DENOMINATOR])
            / self._means[..., _DENOMINATOR, None]
        )

    def shift(self, slopes: Array, pooled: Array) -> Array:
        """`(…,)`: what the ratio owes to the people this arm happened to get."""
        return np.asarray((slopes * (self._means[..., _COVARIATES:] - pooled)).sum(-1))

    def variance(self, slopes: Array | None) -> Array:
        """`(…,)`: of the arm's ratio, with CUPED if `slopes (…, k)` are given."""
        weights = np.zeros(self._means.shape)
        scale = self._means[..., _DENOMINATOR]
        with np.errstate(divide="ignore", invalid="ignore"):
            weights[..., _NUMERATOR] = 1 / scale
            weights[..., _DENOMINATOR] = -self.ratio / scale
            if slopes is not None:
                weights[..., _COVARIATES:] = -slopes
            total = (weights[..., None, :] @ self._covariance @ weights[..., :, None])[..., 0, 0]
            # Rounding may leave a tiny negative where nothing varies.
            return np.asarray(np.maximum(total, 0.0) / self.n)


def _slopes(arms: list[_Arm]) -> Array:
    """`(…, k)`: of the linearised ratio on the covariates, one for all arms, so that it moves them alike.

    Each arm counts by one over its people, as its variance does in the difference. A covariate that does not vary gets 0.
    """
    shape = arms[0].covariates.shape
    if not shape[-1]:
        return np.zeros(shape[:-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = sum(np.nan_to_num(arm.covariates / arm.n[..., None, None]) for arm in arms)
        across = sum(np.nan_to_num(arm.with_ratio / arm.n[..., None], posinf=0, neginf=0) for arm in arms)
    spread = np.einsum("...kk->...k", inside)
    used = spread > 1e-12 * np.maximum(spread.max(axis=-1, keepdims=True), 1e-300)
    root = np.sqrt(np.where(used, spread, 1.0))
    # As correlations, with a ridge that is nothing to data and everything to a column that repeats another.
    correlation = np.asarray(inside) / root[..., :, None] / root[..., None, :] + 1e-9 * np.eye(shape[-1])
    correlation = np.where(used[..., :, None] & used[..., None, :], correlation, np.eye(shape[-1]))
    solved = np.linalg.solve(correlation, (np.asarray(across) / root * used)[..., None])[..., 0]
    return np.asarray(solved / root * used)


def _columns(numerator: ArrayLike, denominator: ArrayLike, covariates: ArrayLike | None) -> Array:
    y, x = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    columns = [np.ones_like(y), y, x]
    if covariates is not None:
        known = np.asarray(covariates, np.float64)
        columns += [np.broadcast_to(known[..., place], y.shape) for place in range(known.shape[-1])]
    return np.stack(columns, axis=-1)
