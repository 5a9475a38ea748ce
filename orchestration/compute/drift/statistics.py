"""How far two samples lie apart, and how often chance alone puts them so far: KS, PSI, chi-square, two means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from orchestration.compute.drift.sketches import Counts, Mean, Sketch

Floats = NDArray[np.float64]

PSI_BINS = 10


def effective(left: float, right: float) -> float:
    """The size of two samples together, as tests of two samples count it: n·m / (n + m)."""
    return left * right / (left + right) if left and right else 0.0


def ks(current: Sketch, references: Sequence[Sketch]) -> tuple[float, float]:
    """Kolmogorov and Smirnov's distance from the references pooled, and its p-value.

    A missing value counts as one below all others, so a change of their share is a distance as well. With ties the p-value
    is an upper bound (Noether 1963).
    """
    points = np.unique(np.concatenate([current.quantiles, *(one.quantiles for one in references)]))
    points = np.concatenate([[-np.inf], points])
    distance = float(np.abs(current.below(points) - pooled_below(references, points)).max())
    size = effective(current.clusters, sum(one.clusters for one in references))
    return distance, float(stats.kstwo.sf(distance, max(1, round(size))))


def psi(current: Sketch, references: Sequence[Sketch]) -> tuple[float, float]:
    """The population stability index over tenths of the references, missing values apart, and its p-value.

    Without drift it is a chi-square variable over the samples' size (Yurdakul & Naranjo 2020).
    """
    edges = pooled_edges(references)
    found = _shares(current.below, edges)
    before = _shares(lambda points: pooled_below(references, points), edges)
    size = effective(current.clusters, sum(one.clusters for one in references))
    # Half an observation in every bin: an empty one is rare, not impossible.
    room = 0.5 / max(size, 1.0)
    found, before = (found + room) / (found + room).sum(), (before + room) / (before + room).sum()
    index = float(((found - before) * np.log(found / before)).sum())
    return index, float(stats.chi2.sf(index * size, max(1, len(found) - 1)))


def chi_square(current: Counts, references: Sequence[Counts]) -> tuple[float, float]:
    """Cohen's w between two sets of shares, and Pearson's p-value with each sample's effective size (Rao & Scott 1981)."""
    names = sorted({name for one in (current, *references) for name in one.shares})
    total = sum(one.effective for one in references)
    found = np.array([current.shares.get(name, 0.0) for name in names])
    before = np.array([sum(one.shares.get(name, 0.0) * one.effective for one in references) for name in names]) / total
    together = (found * current.effective + before * total) / (current.effective + total)
    seen = together > 0
    if seen.sum() < 2:
        return 0.0, 1.0
    # Of what both together expect: a name that only one of them knows is then no division by nothing.
    w = float(np.sqrt((((found - before) ** 2)[seen] / together[seen]).sum()))
    return w, float(stats.chi2.sf(w * w * effective(current.effective, total), seen.sum() - 1))


def two_means(current: Mean, references: Sequence[Mean]) -> tuple[float, float]:
    """How far a mean is from the references' mean, as a share of it, and the p-value of the difference.

    What references differ from each other by more than their errors say counts as chance too.
    """
    means, errors = np.array([one.mean for one in references]), np.array([one.error for one in references])
    weight = 1 / np.maximum(errors, 1e-12) ** 2
    before = float((weight * means).sum() / weight.sum())
    over = float((weight * (means - before) ** 2).sum() / max(len(means) - 1, 1)) if len(means) > 1 else 1.0
    error = float(np.sqrt((current.error**2 + 1 / weight.sum()) * max(over, 1.0)))
    apart = current.mean - before
    change = apart / abs(before) if before else float(np.sign(apart))
    return change, float(2 * stats.norm.sf(abs(apart) / max(error, 1e-12)))


def pooled_below(references: Sequence[Sketch], points: Floats) -> Floats:
    """`(p,)`: the share of the references' values at or below each point, each reference by its size."""
    total = sum(one.clusters for one in references)
    return np.asarray(sum(one.below(points) * (one.clusters / total) for one in references))


def pooled_edges(references: Sequence[Sketch]) -> Floats:
    """`(e,)`: edges of about `PSI_BINS` bins that hold as many of the references' values each."""
    values = np.concatenate([one.quantiles for one in references])
    if not len(values):
        return np.zeros(0)
    return np.unique(np.quantile(values, np.linspace(0, 1, PSI_BINS + 1)[1:-1], method="inverted_cdf"))


def _shares(below: Callable[[Floats], Floats], edges: Floats) -> Floats:
    upto = below(np.concatenate([[-np.inf], edges, [np.inf]]))
    return np.diff(upto, prepend=0.0)
