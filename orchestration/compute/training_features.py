"""What was known at a label's time, as training asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.evaluate import SlateFeatures


class LabelFeatures(Protocol):
    """What was known at a label's time, for training."""

    def __call__(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
        """A `MakeSlates`: features of label rows `(l,)` and candidate items `(l, n)`."""
        ...

    def trends(self, instants: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Candidate features of every item at `instants (t,)`, microseconds UTC: values and mask `(t, items, g)`."""
        ...


@dataclass(frozen=True, slots=True)
class FiniteFeatures:
    """The same features, where what is no finite number counts as missing: one NaN would be in every score of its batch."""

    features: LabelFeatures

    def __call__(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
        known = self.features(rows, candidates)
        return SlateFeatures(
            *_finite(known.context_features, known.context_mask),
            *_finite(known.candidate_features, known.candidate_mask),
        )

    def trends(self, instants: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return _finite(*self.features.trends(instants))


def _finite(values: NDArray[np.float32], mask: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    present = np.isfinite(values) & (mask > 0)
    return np.where(present, values, np.float32(0)), present.astype(np.float32)
