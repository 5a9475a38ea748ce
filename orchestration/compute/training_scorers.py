"""How a ranker in training ranks: as stage 1 learns it, as the index will see it, and as serving would re-rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from orchestration.compute.evaluate import MakeSlates, RankerScorer, Scorer
from orchestration.compute.losses import to_tensor
from orchestration.compute.mining import SLATE
from orchestration.compute.model import ItemTower, Ranker
from orchestration.compute.objective import Trends
from orchestration.compute.splits import Queries


@dataclass(frozen=True, slots=True)
class TrainingScorers:
    """Scorers `(q, items)` by the modules as they are when one is asked."""

    ranker: Ranker
    tower: ItemTower
    trends: Trends
    temperature: float
    """That the retriever is trained at."""
    device: torch.device
    labels: Queries
    """The slates' labels, in the order of their rows."""
    wished: NDArray[np.float32]
    """`(labels, 384)`: what was wished for at each of them; zeros where nothing was."""
    features: MakeSlates | None
    sources: tuple[Scorer, ...]
    """Where serving takes candidates from, beside the index."""

    def stage_1(self, queries: Queries) -> NDArray[np.float32]:
        """⟨u, v⟩/τ + what every item gains by its features: what stage 1 learns."""
        with torch.no_grad():
            gains = self.trends.gains(self.ranker.trend.weight).cpu().numpy()
        scores: NDArray[np.float32] = self.similarity(queries) + gains[self.trends.when(queries.at)]
        return scores

    def served(self, queries: Queries) -> NDArray[np.float32]:
        """The candidates that serving would offer, re-ranked with what was known at each label's time."""
        return self._scorer(rerank=2 * SLATE, slates=self.features, sources=self.sources)(queries)

    def similarity(self, queries: Queries) -> NDArray[np.float32]:
        """⟨u, v⟩/τ of every item: what the ANN index will see."""
        logits: NDArray[np.float32] = self._scorer(rerank=0)(queries) / np.float32(self.temperature)
        return logits

    def wished_similarity(self, labels: Queries) -> NDArray[np.float32]:
        """The same for some of the slates' labels, each with its wish: what serving asks the index with."""
        scorer = self._scorer(rerank=0, wish_vectors=self._wishes)
        logits: NDArray[np.float32] = scorer(labels) / np.float32(self.temperature)
        return logits

    def _wishes(self, labels: Queries) -> NDArray[np.float32]:
        """`(q, d)`: the wishes of some of the slates' labels in item space; zeros without one."""
        wished = self.wished[np.searchsorted(self.labels.label, labels.label)]
        with torch.no_grad():
            projected = self.tower.project_text(to_tensor(wished, self.device)).cpu().numpy()
        return np.where(wished.any(1, keepdims=True), projected, np.float32(0))

    def _scorer(
        self,
        *,
        rerank: int | None,
        slates: MakeSlates | None = None,
        sources: tuple[Scorer, ...] = (),
        wish_vectors: Callable[[Queries], NDArray[np.float32]] | None = None,
    ) -> RankerScorer:
        def run(inputs: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            with torch.no_grad():
                user, scores = self.ranker(**{name: to_tensor(value, self.device) for name, value in inputs.items()})
            return user.cpu().numpy(), scores.cpu().numpy()

        with torch.no_grad():
            vectors = self.tower()[0].cpu().numpy()
        return RankerScorer(
            run,
            vectors,
            context_features=self.ranker.shape.context_features,
            candidate_features=self.ranker.shape.candidate_features,
            slates=slates,
            rerank=rerank,
            sources=sources,
            wish_vectors=wish_vectors,
        )
