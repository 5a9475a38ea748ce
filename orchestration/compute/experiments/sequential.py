"""Intervals and p-values that hold at every look at once: a confidence sequence for an effect with a standard error.

An estimate whose influence adds up over people behaves, once there are enough of them, like a Brownian motion in its own
variance. Mixing its likelihood ratio over effects drawn from N(0, τ²) gives a martingale, and Ville's inequality makes it
a test that may be looked at any number of times: the mixture sequential probability ratio test (Robbins 1970; Johari, Koomen,
Pekelis & Walsh 2017). The interval of effects that the test does not reject is the asymptotic confidence sequence of
Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas (2024, theorem 2.2): the two are one formula, written here in the estimate's
standard error s instead of a count.

τ decides when the interval is tightest, never whether it holds. `tune` sets it from the smallest lift that is worth
finding, before any outcome is seen, so that the interval is tightest when such a lift is about to be found.

People come back. Their later outcomes resemble their earlier ones, so the process keeps more of its past than a Brownian
motion does; by Slepian's lemma it then crosses a boundary no more often. Looking daily at totals per person is therefore
safe, a little on the careful side; tests/orchestration/compute/test_experiment_proofs.py measures how often it errs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import lambertw, ndtri

from schemas.errors import DefinitionError

ALPHA = 0.05
POWER = 0.8

Array = NDArray[np.float64]


def tune(smallest_lift: float, alpha: float = ALPHA, power: float = POWER) -> float:
    """The mixture's τ for which the interval is tightest when `smallest_lift` is found with `power`.

    The width at a given s is least for τ² = s² (−W₋₁(−α²/e) − 1) (Waudby-Smith et al. 2024, section 3.5). Raises
    DefinitionError for a lift that is not above zero.
    """
    if not smallest_lift > 0:
        raise DefinitionError(
            f"the smallest lift worth finding is {smallest_lift}; give a share above 0, such as 0.05 for 5 %"
        )
    ratio = _best_ratio(alpha)
    widths = float(half_width(1.0, math.sqrt(ratio), alpha))
    return math.sqrt(ratio) * smallest_lift / (widths + float(ndtri(power)))


def half_width(se: ArrayLike, tau: float, alpha: float = ALPHA) -> Array:
    """Half the width of the interval at standard error `se`, any shape: it holds at all looks at once with 1 − alpha."""
    s = np.asarray(se, np.float64)
    grown = 1 + (tau / s) ** 2
    return np.asarray(s * np.sqrt(grown / (grown - 1) * (2 * math.log(1 / alpha) + np.log(grown))))


def one_sided_width(se: ArrayLike, tau: float, alpha: float = ALPHA) -> Array:
    """How far a one-sided bound lies from the estimate, any shape: it holds at all looks at once with 1 − alpha.

    The mixture is over the half of N(0, τ²) that lies on the bound's side (Waudby-Smith et al. 2024, appendix B); with
    Φ(y) ≥ 1 − exp(−y²/2)/2 it is above 1/alpha wherever y² ≥ 2 log((1 + √(1 + τ²/s²)/alpha) / 2).
    """
    s = np.asarray(se, np.float64)
    grown = 1 + (tau / s) ** 2
    return np.asarray(s * np.sqrt(grown / (grown - 1) * 2 * np.log((1 + np.sqrt(grown) / alpha) / 2)))


def p_value(effect: ArrayLike, se: ArrayLike, tau: float) -> Array:
    """The p-value at each look that no effect is there. The least so far is a p-value as well, whenever one stops."""
    delta, s = np.asarray(effect, np.float64), np.asarray(se, np.float64)
    grown = 1 + (tau / s) ** 2
    log_evidence = (delta / s) ** 2 * (1 - 1 / grown) / 2 - np.log(grown) / 2
    return np.asarray(np.exp(-np.maximum(log_evidence, 0.0)))


def _best_ratio(alpha: float) -> float:
    return float(-lambertw(-(alpha**2) / math.e, -1).real - 1)
