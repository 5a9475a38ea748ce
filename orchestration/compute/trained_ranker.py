"""What a training leaves: the model, how it got there, and how it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from orchestration.compute.evaluate import MakeSlates, RankerScorer, Scorer
from orchestration.compute.model import ItemTower, Ranker
from orchestration.compute.train_config import TrainConfig


@dataclass(frozen=True, slots=True)
class Progress:
    """One line of a training log. `ndcg_at_10` is None for epochs that were not validated."""

    stage: int
    epoch: int
    epochs: int
    loss: float
    ndcg_at_10: float | None
    seconds: float


@dataclass(slots=True)
class TrainedRanker:
    """A trained model, on the CPU and in evaluation mode, with all that an artefact needs."""

    ranker: Ranker
    tower: ItemTower
    config: TrainConfig
    progress: list[Progress]
    validation: dict[str, float]  # empty where no label was validated on
    calibration: tuple[float, float]  # probability = sigmoid(scale · score + offset)
    seconds: float

    def item_vectors(self) -> NDArray[np.float32]:
        """`(items, d)`: rows in the order of the catalogue, length 1."""
        with torch.no_grad():
            vectors: NDArray[np.float32] = self.tower()[0].numpy()
        return vectors

    def text_projection(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`weight (d, 384)`, `bias (d,)`: a text's vector is normalise(weight·text + bias)."""
        with torch.no_grad():
            weight, bias = self.tower.affine()
            return weight.numpy(), bias.numpy()

    def item_residuals(self) -> NDArray[np.float32]:
        """`(items, d)`, zero for items without one: v = normalise(projected text + residual)."""
        with torch.no_grad():
            return self.tower.residuals().numpy()

    def run(self, inputs: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`user_vector (b, d)` and `scores (b, n)` for the contract's inputs, as an ONNX session would answer."""
        with torch.no_grad():
            user, scores = self.ranker(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return user.numpy(), scores.numpy()

    def scorer(
        self, slates: MakeSlates | None = None, *, rerank: int | None = 500, sources: tuple[Scorer, ...] = ()
    ) -> RankerScorer:
        """This model as a row of an evaluation."""
        return RankerScorer(
            self.run,
            self.item_vectors(),
            context_features=self.ranker.shape.context_features,
            candidate_features=self.ranker.shape.candidate_features,
            slates=slates,
            rerank=rerank,
            sources=sources,
        )
