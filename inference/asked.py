"""A request with all that was read for it: what its candidates are asked by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from inference import wishes
from inference.candidates import Filters
from inference.rules import Rules
from inference.store import PersonRow
from schemas.events import NEGATIVE_KINDS
from schemas.serving import RecommendationRequest

RECENT_ITEMS = 20
"""So many of the newest items look up their co-visitation neighbours."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request with what was read for it."""

    request: RecommendationRequest
    at: datetime
    person: PersonRow
    rules: Rules
    wishing: Callable[[], NDArray[np.float32] | None]
    """Waits for the wish's vector, once."""
    audited: bool = False
    features: bool = True
    limit: int = 500
    wish: wishes.ParsedWish | None = None

    @property
    def wish_text(self) -> NDArray[np.float32] | None:
        """The wish's vector `(384,)`; None without a wish, and where it could not be encoded."""
        return self.wishing()

    @property
    def in_parts(self) -> bool:
        """Whether its candidates can be picked in parts: what the caller names, or what is audited, is of one statement."""
        return self.features and not self.audited and self.request.candidates is None

    def filters(self) -> Filters:
        """The caller's conditions, the rules' and the wish's, less what the person had or was shown."""
        # Candidates that the caller names are ranked even if the person had them.
        seen = [] if self.request.candidates is not None else self.person.history.item_ids
        filters = Filters(
            exclude=list(dict.fromkeys([*self.request.exclude, *seen, *self.person.held_back])),
            categories=self.request.filters.categories or None,
            exclude_categories=self.request.filters.exclude_categories,
            where=self.rules.where(self.request.filters.where),
            groups=self.rules.conditions,
        )
        return wishes.narrowed(filters, self.wish)

    def recent(self) -> list[str]:
        """The newest items that were not turned down, the newest first: those whose neighbours are looked up."""
        history = self.person.history
        liked = [item for item, kind in zip(history.item_ids, history.kinds, strict=True) if kind not in NEGATIVE_KINDS]
        return list(dict.fromkeys(reversed(liked)))[:RECENT_ITEMS]
