"""Whether people were split among the arms as declared: a mismatch means that nothing else in the report can be trusted.

Fabijan et al. (2019) found a mismatch in about 6 % of experiments, and list the causes: broken assignment, people lost on
the way, a log that drops rows of one arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, logsumexp
from scipy.stats import chisquare

from schemas.errors import DefinitionError

MISMATCH_P = 0.001
"""Strict, because the check runs for every experiment and a broken split ends one."""
CONCENTRATIONS = (100.0, 1_000.0, 10_000.0, 100_000.0)
"""Of Dirichlet priors around the declared shares, each as likely: mismatches of about 5 to 0.15 percentage points between two
halves. One alone sees either what some hundred people show or what a hundred thousand do."""


@dataclass(frozen=True, slots=True)
class Split:
    """People by arm against the declared shares.

    `chi_square_p` holds for one look at a moment fixed before; `sequential_p` holds however often one has looked.
    """

    people: tuple[int, ...]
    expected: tuple[float, ...]
    chi_square_p: float
    sequential_p: float

    def broken(self, last_look: bool = False) -> bool:
        """True for a mismatch. At the last look of an experiment that had a fixed end, chi-square counts as well."""
        return self.sequential_p < MISMATCH_P or (last_look and self.chi_square_p < MISMATCH_P)


def judge_split(counts: ArrayLike, shares: Sequence[float]) -> Split:
    """The split after the last of `counts (looks, arms)`: people so far at each look.

    Raises DefinitionError unless every share is above zero; they are scaled to sum to 1.
    """
    seen = np.atleast_2d(np.asarray(counts, np.float64))
    declared = _scaled(shares, seen.shape[-1])
    people = seen[-1]
    fixed = float(chisquare(people, people.sum() * declared).pvalue) if people.sum() else 1.0
    return Split(
        tuple(int(count) for count in people),
        tuple(float(count) for count in people.sum() * declared),
        fixed,
        float(sequential_p(seen, shares).min()),
    )


def sequential_p(counts: ArrayLike, shares: Sequence[float]) -> NDArray[np.float64]:
    """`(…,)`: the p-value at each look of `counts (…, arms)`; the least so far may be acted upon at any time.

    One over the Bayes factor of a multinomial whose shares have a Dirichlet prior around the declared ones, a martingale
    if people are split as declared (Lindon & Malek 2022); so is the mean of several.
    """
    seen = np.asarray(counts, np.float64)
    declared = _scaled(shares, seen.shape[-1])
    total = seen.sum(axis=-1)
    as_declared = (seen * np.log(declared)).sum(axis=-1)
    log_factors = [
        (gammaln(size * declared + seen) - gammaln(size * declared)).sum(axis=-1)
        + gammaln(size)
        - gammaln(size + total)
        - as_declared
        for size in CONCENTRATIONS
    ]
    evidence = logsumexp(log_factors, axis=0) - np.log(len(CONCENTRATIONS))
    return np.asarray(np.exp(-np.maximum(evidence, 0.0)))


def _scaled(shares: Sequence[float], arms: int) -> NDArray[np.float64]:
    declared = np.asarray(shares, np.float64)
    if declared.shape != (arms,) or not (declared > 0).all():
        raise DefinitionError(
            f"shares {list(shares)} do not fit {arms} arms: give each arm that is shown a share above 0"
        )
    return np.asarray(declared / declared.sum())
