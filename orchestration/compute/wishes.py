"""What people might say they want, for training: made from the categories of what they went on to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Wishes:
    """What training wishes are made of: `category_vectors (c, 384)` encoded wishes, `item_categories (items, c) bool`."""

    category_vectors: NDArray[np.float32]
    item_categories: NDArray[np.bool_]

    def draw(
        self, items: NDArray[np.int32], generator: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """A wish for each of `items (m,)`, which the person went on to like: the mean of one or two of its categories.

        Returns `(m, 384)` text vectors (zero where the item has no category) and `(m, c)` the categories meant.
        """
        noise = generator.random((len(items), self.item_categories.shape[1])) * self.item_categories[items]
        rank = np.argsort(np.argsort(-noise, axis=1, kind="stable"), axis=1, kind="stable")
        meant = (rank < generator.integers(1, 3, len(items))[:, None]) & (noise > 0)
        vectors = meant.astype(np.float32) @ self.category_vectors
        norm = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.maximum(norm, 1e-9)).astype(np.float32), meant

    def draw_some(
        self, items: NDArray[np.int32], generator: np.random.Generator, null_rate: float
    ) -> NDArray[np.float32]:
        """`(m, 384)` wishes for `items (m,)`, a share `null_rate` of them withheld; zeros are no wish."""
        vectors, meant = self.draw(items, generator)
        given = meant.any(1) & (generator.random(len(items)) >= null_rate)
        return np.where(given[:, None], vectors, np.float32(0))
