"""Next-item softmax: personal taste through vectors, what everybody wants at the time through the item's features.

Logits are ⟨u, v⟩/τ + trend(features of the item then). The second part carries popularity, so the vectors need not:
they learn what a person wants more than others do, and that lasts when the fashion of the training weeks is over. It is
solved for before the vectors are learned: descended together, they memorise each week's fashion faster than it is weighed.
Items that were not there by then take no part, or every newcomer would have been taught to be a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from orchestration.compute.co_visitation import DAY_MICROSECONDS
from orchestration.compute.interactions import Interactions
from orchestration.compute.model import FeatureEncoder
from orchestration.compute.stacking import popularity_weights
from orchestration.compute.train_config import TrainConfig

MOST_CELLS = {"cpu": 1 << 21, "cuda": 1 << 24}
"""Instants × items held at most by kind of device, 200 MB and 1.6 GB: more items are looked at less often."""
ABSENT = -1e4


class Trends:
    """What was known of every item at the start of each day with events, standardised: `(t, items, 2 g)`."""

    def __init__(
        self,
        interactions: Interactions,
        encoder: FeatureEncoder,
        features: Callable[[NDArray[np.int64]], tuple[NDArray[np.float32], NDArray[np.float32]]] | None,
        device: torch.device,
    ) -> None:
        items = len(interactions.item_ids)
        days = np.unique(interactions.occurred_at // DAY_MICROSECONDS) * DAY_MICROSECONDS
        if features is None and interactions.available_at is None:
            days = days[:1]  # nothing differs from day to day
        self.learned = features is not None
        self._instants = days[:: -(-len(days) * items // MOST_CELLS.get(device.type, MOST_CELLS["cpu"]))]
        if features is None:
            self._features = torch.zeros(len(self._instants), items, 1, device=device)
        else:
            values, mask = (torch.from_numpy(part).to(device) for part in features(self._instants))
            self._features = encoder.standardise(values, mask)
        # An item without one event is no lesson: it may be new, and its text would be taught to be a mistake.
        never = np.bincount(interactions.item, minlength=items) == 0
        absent = np.tile(never, (len(self._instants), 1))
        if interactions.available_at is not None:
            until = np.append(self._instants[1:], np.iinfo(np.int64).max)
            absent |= interactions.available_at[None, :] >= until[:, None]
        self._absent = torch.from_numpy(absent).to(device)  # (t, items)

    def when(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """`(m,)`: the last instant that is not after `at (m,)`, microseconds UTC."""
        return np.maximum(np.searchsorted(self._instants, at, side="right") - 1, 0)

    def gains(self, weight: Tensor) -> Tensor:
        """`(t, items)`: what `weight (1, 2 g)` makes of every item's features at each instant; constant without features."""
        if not self.learned:
            return self._features[..., 0]
        return functional.linear(self._features, weight).squeeze(-1)

    def fit(self, interactions: Interactions, labels: NDArray[np.int64], weight: Tensor) -> None:
        """Set `weight (1, 2 g)` to what says best, by itself, which items the events `labels (m,)` are of."""
        if not self.learned:
            return
        shape = tuple(self._absent.shape)
        cell = self.when(interactions.occurred_at[labels]) * shape[1] + interactions.item[labels]
        chosen = torch.from_numpy(np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)).to(weight.device)
        with torch.no_grad():
            found = popularity_weights(self._features, self._absent, chosen, weight[0])
            weight[0].copy_(found)

    def present(self, gains: Tensor) -> Tensor:
        """The same gains; hopeless for an item that was not there by then."""
        return gains.masked_fill(self._absent, ABSENT)

    def absent(self, at: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`(m, items)`: what was not there at `at (m,)`."""
        held: NDArray[np.bool_] = self._absent.cpu().numpy()[self.when(at)]
        return held


def item_softmax(
    users: Tensor,
    target: Tensor,
    vectors: Tensor,
    trend: Tensor,
    when: Tensor,
    config: TrainConfig,
    counts: NDArray[np.float32],
    generator: np.random.Generator,
) -> Tensor:
    """Mean cross-entropy of `target (m,)` for `users (m, d)` among `vectors (items, d)`; a scalar.

    `trend (t, items)` is added at row `when (m,)`. Beyond `config.all_items_limit` items, shared negatives stand for
    them: uniform ones and ones by popularity (`counts (items,)`), corrected for how likely they were drawn.
    """
    if len(users) == 0:
        return vectors.sum() * 0
    if len(vectors) <= config.all_items_limit:
        loss: Tensor = AllItemsSoftmax.apply(users, vectors, target, config.temperature, trend, when)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return loss
    uniform = generator.integers(0, len(vectors), config.uniform_negatives)
    share = counts / counts.sum()
    popular = np.searchsorted(np.cumsum(share), generator.random(config.popular_negatives)).clip(max=len(share) - 1)
    drawn = np.concatenate([uniform, popular])
    expected = config.uniform_negatives / len(share) + config.popular_negatives * share[drawn]
    negatives = torch.from_numpy(drawn).to(users.device)
    correction = torch.from_numpy(np.log(expected)).to(users)
    logits = users @ vectors[negatives].T / config.temperature - correction + trend[when[:, None], negatives]  # (m, s)
    logits = logits.masked_fill(negatives.unsqueeze(0) == target.unsqueeze(1), ABSENT)
    own = (users * vectors[target]).sum(-1) / config.temperature + trend[when, target]
    return functional.cross_entropy(torch.cat([own.unsqueeze(1), logits], dim=1), torch.zeros_like(target))


class AllItemsSoftmax(torch.autograd.Function):
    """Mean cross-entropy over all items, with its gradient made in the forward pass (as in Liger Kernel, 2024).

    The (m, items) table of logits is built piece by piece, turned into its own gradient and dropped: written twice where
    autograd would keep and rewrite it four times. Under autocast its products are those of bfloat16.
    """

    CELLS: ClassVar = {"cpu": 1 << 21, "cuda": 1 << 27}
    """Of the table at a time, by kind of device: enough rows for the products, few enough for its memory."""

    @staticmethod
    def forward(
        ctx: Any, users: Tensor, vectors: Tensor, target: Tensor, temperature: float, trend: Tensor, when: Tensor
    ) -> Tensor:
        m, items = len(users), len(vectors)
        kind = users.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else users.dtype
        cells = AllItemsSoftmax.CELLS.get(kind, AllItemsSoftmax.CELLS["cpu"])
        rows = max(16, min(m, cells // items))
        user_gradient, item_gradient = torch.empty_like(users), torch.zeros_like(vectors)
        trend_gradient = torch.zeros_like(trend) if ctx.needs_input_grad[4] else None
        logits, shares = users.new_empty(rows, items), users.new_empty(rows, items)
        index, candidates = torch.arange(rows, device=users.device), vectors.to(dtype)
        total = users.new_zeros(())
        for begin in range(0, m, rows):
            part, wanted, then = (array[begin : begin + rows] for array in (users, target, when))
            part, here = part / temperature, index[: len(part)]
            # One instant is added to every row alike: no table of its own to gather.
            added = trend if len(trend) == 1 else torch.index_select(trend, 0, then, out=shares[: len(part)])
            table = torch.addmm(added, part, vectors.T, out=logits[: len(part)])  # (rows, items)
            own, highest = table[here, wanted], table.amax(-1)
            share = torch.softmax(table, -1, out=shares[: len(part)])
            # exp(highest − normaliser) is the largest share: at least 1 / items, where the target's own may underflow.
            total = total + (highest - share.amax(-1).log() - own).sum()
            share[here, wanted] -= 1
            if trend_gradient is not None:
                trend_gradient.index_add_(0, then, share)
            share, part = share.to(dtype), part.to(dtype)
            user_gradient[begin : begin + rows] = share @ candidates
            item_gradient += share.T @ part
        ctx.save_for_backward(
            user_gradient.div_(temperature * m),
            item_gradient.div_(m),
            None if trend_gradient is None else trend_gradient.div_(m),
        )
        return total / m

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, Tensor | None, None]:
        user_gradient, item_gradient, trend_gradient = ctx.saved_tensors
        given = gradients[0]
        by_trend = None if trend_gradient is None else given * trend_gradient
        return given * user_gradient, given * item_gradient, None, None, by_trend, None
