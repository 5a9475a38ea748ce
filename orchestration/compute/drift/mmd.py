"""Maximum mean discrepancy: whether two samples of vectors come from one distribution (Gretton et al. 2012).

The kernel is Gaussian with the median distance as its width. Its matrix is never held: a block of its rows is made at a
time and all permutations are taken of it at once, so memory grows with the sample and not with its square.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Vectors = NDArray[np.float32]

BLOCK_ROWS = 512
PERMUTATIONS = 500
MEDIAN_SAMPLE = 1_000
"""The median of the distances is taken over so many vectors at most."""
LEAST_EXCEEDING = 10
"""Below so many permutations that lie further apart than the samples, the p-value is a fitted tail's."""


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """`squared` is the unbiased MMD² (below 0 by chance), `p` the share of permutations that lie as far apart."""

    squared: float
    p: float
    width: float


def mmd(
    left: Vectors,
    right: Vectors,
    *,
    width: float | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    block_rows: int = BLOCK_ROWS,
) -> Discrepancy:
    """The discrepancy of `left (n, d)` and `right (m, d)`, n and m ≥ 2; `width` None: their median distance.

    A p-value below what so many permutations can tell is that of a gamma distribution fitted to them by mean, spread and
    skewness, as Gretton et al. (2009) fit one to the limit. `permutations` 0 gives the distance alone, with p = 1.
    """
    n, m = len(left), len(right)
    if n < 2 or m < 2:
        raise ValueError(f"{n} and {m} vectors are too few to be compared; at least 2 of each are needed")
    both = np.ascontiguousarray(np.concatenate([left, right]), np.float32)
    if width is None:
        width = median_distance(both, seed)
    generator = np.random.default_rng(seed)
    # A column per way to part the vectors in two, the given one first: True is on the left.
    parted = np.zeros((n + m, 1 + permutations), np.float32)
    parted[:n, 0] = 1
    for column in range(1, 1 + permutations):
        parted[generator.permutation(n + m)[:n], column] = 1
    within_left, total, to_left = _sums(both, parted, width, block_rows)
    # to_left = Σ_ij s_i K_ij: within the left once, and across once.
    across = to_left - within_left
    within_right = total - within_left - 2 * across
    squared = (
        (within_left - n) / (n * (n - 1)) + (within_right - m) / (m * (m - 1)) - 2 * across / (n * m)
    )  # a vector's likeness to itself, 1, is no part of it
    return Discrepancy(float(squared[0]), _p(float(squared[0]), squared[1:]), width)


def median_distance(vectors: Vectors, seed: int = 0) -> float:
    """The median distance between two of `vectors (n, d)`: the kernel's width where nothing better is known."""
    if len(vectors) > MEDIAN_SAMPLE:
        vectors = vectors[np.random.default_rng(seed).permutation(len(vectors))[:MEDIAN_SAMPLE]]
    squared = _squared_distances(vectors, vectors)
    found = float(np.sqrt(np.median(squared[np.triu_indices(len(vectors), 1)])))
    return found or 1.0  # all the same: any width says so


def _sums(
    vectors: Vectors, parted: NDArray[np.float32], width: float, block_rows: int
) -> tuple[NDArray[np.float64], float, NDArray[np.float64]]:
    """Of the kernel's matrix K and each column s of `parted`: sᵀKs, 1ᵀK1, 1ᵀKs."""
    columns = parted.shape[1]
    within, to_left, total = np.zeros(columns), np.zeros(columns), 0.0
    for begin in range(0, len(vectors), block_rows):
        rows = slice(begin, begin + block_rows)
        kernel = np.exp(_squared_distances(vectors[rows], vectors) * (-0.5 / width**2))
        product = (kernel @ parted).astype(np.float64)
        within += (product * parted[rows]).sum(axis=0)
        to_left += product.sum(axis=0)
        total += float(kernel.sum(dtype=np.float64))
    return within, total, to_left


def _squared_distances(left: Vectors, right: Vectors) -> NDArray[np.float32]:
    found = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1) - 2 * left @ right.T
    return np.asarray(np.maximum(found, 0), np.float32)


def _p(squared: float, permuted: NDArray[np.float64]) -> float:
    if not len(permuted):
        return 1.0
    exceeding = int((permuted >= squared).sum())
    if exceeding >= LEAST_EXCEEDING:
        return (exceeding + 1) / (len(permuted) + 1)
    skew = max(float(stats.skew(permuted)), 1e-3)
    fitted = float(stats.pearson3.sf(squared, skew, loc=permuted.mean(), scale=permuted.std(ddof=1) or 1e-12))
    return min(fitted, (exceeding + 1) / (len(permuted) + 1))
