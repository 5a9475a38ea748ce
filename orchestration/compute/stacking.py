"""Weights of features and of whole scores, solved for exactly: a conditional logit (McFadden 1974) is convex.

Descended together with millions of a model's parameters, a few weights come last: what they would explain the others
have memorised by then, and that is gone with the weeks it was learned from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

PRIOR = 0.5
"""Standard deviation of how far a weight is expected to lie from where it was: a few labels move it little."""
LEAST_TRUST = 0.2
"""A wish is heard through the retriever: it keeps a say where it knows nothing of people without one."""
_ITERATIONS = 100


def stack(similarity: Tensor, features: Tensor, correction: Tensor, trend: Tensor) -> Tensor:
    """Fit `trust · similarity + features · weights` to slates whose first candidate is what the person chose.

    `similarity (l, n)` are the retriever's logits, `features (l, n, g)` what was known of each candidate, standardised,
    `correction (l, n)` is taken off each logit (how likely the candidate was drawn), `trend (g,)` are the weights so far.
    Returns `(1 + g,)`: trust, then the new weights.

    A score that was learned on these very labels would be surer of itself than it is right about others: hence labels
    held out from it (stacked generalisation, Wolpert 1992).
    """
    start = torch.cat([similarity.new_ones(1), trend])
    if len(similarity) == 0:
        return start
    known = torch.cat([similarity.unsqueeze(-1), features], dim=-1).double()  # (l, n, 1 + g)
    target = torch.zeros(len(known), dtype=torch.long)

    def loss(weights: Tensor) -> Tensor:
        return functional.cross_entropy(known @ weights - correction, target)

    found = _solve(loss, start.double(), labels=len(known))
    found[0].clamp_(min=LEAST_TRUST)
    return found.to(trend)


def popularity_weights(features: Tensor, absent: Tensor, chosen: Tensor, trend: Tensor) -> Tensor:
    """Weights `(g,)` by which features alone say best what people choose; `trend (g,)` are those so far.

    `features (t, items, g)` were known of the items at each of t instants, those `absent (t, items)` were not there, and
    `chosen (t, items)` counts how often each was chosen from then to the next instant.
    """
    labels = int(chosen.sum())
    if labels == 0:
        return trend.clone()
    share = (chosen / labels).to(features)

    def loss(weights: Tensor) -> Tensor:
        logits = (features @ weights).masked_fill(absent, -1e4)
        return -(share * torch.log_softmax(logits, dim=-1)).sum()

    return _solve(loss, trend, labels=labels)


@torch.enable_grad()
def _solve(loss: Callable[[Tensor], Tensor], start: Tensor, *, labels: int) -> Tensor:
    """The weights with the least `loss` per label, given the prior around `start`."""
    start = start.detach()
    weights = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([weights], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def total() -> Tensor:
        solver.zero_grad()
        value = loss(weights) + (weights - start).square().sum() / (2 * PRIOR**2 * labels)
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return value

    solver.step(total)  # type: ignore[no-untyped-call]  # as above
    return weights.detach()
