"""The last rung: the list that ships with the artefact, for when the database cannot be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from inference import rerank
from inference.models import PopularItem
from inference.predicates import Condition
from inference.rules import Rules, bits_of
from schemas.serving import Because, RecommendationRequest, RecommendationResponse, RecommendedItem

POPULAR_VERSION = "popular"
"""What answers say of lists that no model made and no history."""


@dataclass(slots=True)
class Known:
    """What was read of the person before the database failed: it holds on the last rung too."""

    had: list[str] = field(default_factory=list)
    held_back: list[str] | None = None


def answer(
    request: RecommendationRequest, request_id: str, popular: Sequence[PopularItem], rules: Rules, known: Known
) -> RecommendationResponse:
    """The best of `popular`. What the request and the rules demand holds here too; of what the person had and was shown,
    only what is `known`. Where a list does not say what an item is, no item of it holds a condition."""
    had = known.had if request.candidates is None else []
    left_out = {*request.exclude, *had, *(known.held_back or ())}
    given = None if request.candidates is None else set(request.candidates)
    only, never = set(request.filters.categories), set(request.filters.exclude_categories)
    where = rules.where(request.filters.where)
    left = [
        item
        for item in popular
        if item.item_id not in left_out
        and (given is None or item.item_id in given)
        and _allowed(item.categories, only, never)
        and _holds(item, where)
    ]
    if any(item.attributes is None or item.categories is None for item in left) and rules.groups:
        left = []  # nobody knows which groups these belong to
    described = [(item.categories or frozenset(), item.attributes or {}) for item in left]
    chosen = rerank.choose(
        np.array([item.score for item in left], np.float32),
        request.k,
        limits=rules.limits(bits_of(rules.conditions, described), request.k),
    )
    items = tuple(
        RecommendedItem(
            item_id=item.item_id,
            score=item.score,
            title=item.title,
            reasons=("popular",) if request.explain else None,
            because=(Because(kind="popular"),) if request.explain else None,
        )
        for item in (left[place] for place in chosen.order.tolist())
    )
    held_back = None if known.held_back is None else len(known.held_back)
    return RecommendationResponse(
        request_id=request_id,
        items=items,
        model_version=POPULAR_VERSION,
        degraded=("database",),
        rules=rules.notes(chosen, wanted(request), held_back=held_back),
    )


def wanted(request: RecommendationRequest) -> int:
    """How many items a request can have: not more than it names."""
    return request.k if request.candidates is None else min(request.k, len(request.candidates))


def _allowed(categories: frozenset[str] | None, only: set[str], never: set[str]) -> bool:
    """Whether a filter by category lets an item through; where its categories are not known, none does."""
    if not only and not never:
        return True
    return categories is not None and not categories & never and (not only or bool(categories & only))


def _holds(item: PopularItem, where: Sequence[Condition]) -> bool:
    if not where:
        return True
    known = item.attributes is not None and item.categories is not None
    return known and all(one.matches(item.categories or (), item.attributes or {}) for one in where)
