"""What would have been scored if something had not been there: exact answers of the ranker itself, in one batch.

    history   less all events of one item        row 1 … e     at most MOST_REMOVALS
    wish      less the whole wish, less a clause  row e + 1 …
    features  less one feature view               the last rows

Row 0 is the request as it was. Every shown item is scored under every change at once: b changes times n items. An event is
left out, not masked: what stood before it moves up and the gap closes, as if it had never happened. The person's and the
items' aggregated features stay as they are; what these do is asked by leaving out a whole view.

Removing inputs and asking the same model again is the counterfactual definition of a reason (PRINCE, Ghazimatin et al.
2020); here a removal is tried, not estimated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from inference.assemble import history_gaps
from inference.ranker import Inputs
from inference.store import History
from schemas.features import FeatureView
from schemas.views import CANDIDATE_VIEWS, CONTEXT_VIEWS, CROSS_VIEWS

MOST_REMOVALS = 16
"""Items of the history that are tried at most, for all shown items together."""
LEAST_REMOVALS = 8
MOST_TOKENS = 3_000
"""What a batch may hold: with a history of 200 events, sixteen removals would take twice as long as with one of 100."""
NEWEST = 4
"""So many of the newest are always tried: the ranker looks at the end of a history most."""
MOST_CLAUSES = 4
"""Clauses of a wish that are tried one by one; each has to be encoded again."""
_CLAUSES = re.compile(
    r"[,;.!?\n]+\s*|\s+(?=(?:and|but|or|with|without|not|no|about|from|for|und|aber|oder|mit|ohne|nicht)\s)",
    re.IGNORECASE,
)
_FILLER = re.compile(r"^(?:and|but|or|und|aber|oder)\s+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Past:
    """The m different items of a history that can be named, newest first; `rows[i]` are all events of item i."""

    item_ids: list[str]
    rows: list[list[int]]
    vectors: NDArray[np.float32]  # (m, d)

    def __len__(self) -> int:
        return len(self.item_ids)


def past_of(history: History, dim: int) -> Past:
    """What `history` holds of items that are still there, have a title and a vector of the model's."""
    rows: dict[str, list[int]] = {}
    for row in range(len(history.item_ids) - 1, -1, -1):
        vector = history.vectors[row]
        if vector is not None and len(vector) == dim and history.titles[row]:
            rows.setdefault(history.item_ids[row], []).append(row)
    vectors = [history.vectors[of[0]] for of in rows.values()]
    return Past(list(rows), list(rows.values()), np.stack(vectors) if vectors else np.zeros((0, dim), np.float32))  # type: ignore[arg-type]


def most_removals(inputs: Inputs, n: int, others: int) -> int:
    """How many items of the history may be tried beside `others` rows of a batch with n candidates, LEAST to MOST_REMOVALS."""
    tokens = inputs["history_vectors"].shape[1] + n + 2
    return int(np.clip(MOST_TOKENS // tokens - others, LEAST_REMOVALS, MOST_REMOVALS))


def surely(past: Past, most: int = MOST_REMOVALS) -> NDArray[np.int64]:
    """Places in `past` of what `preselect` takes whatever the evidence says: all where there are few, else the newest."""
    return np.arange(len(past) if len(past) <= most else min(NEWEST, most))


def preselect(
    past: Past, shown: NDArray[np.float32], people: NDArray[np.int64], most: int = MOST_REMOVALS
) -> NDArray[np.int64]:
    """Places `(≤ most,)` in `past` of what is most likely to have moved a shown item: the newest, then for each item in turn.

    `shown (n, d)` are the shown items' vectors, `people (m, n)` how many people had both. An item's turn takes what is most
    like it, more for being new and for what people had both.
    """
    m, sure = len(past), surely(past, most)
    if len(sure) == m:
        return sure
    likeness = past.vectors @ shown.T  # (m, n)
    evidence = np.log1p(people) / max(float(np.log1p(people).max(initial=0)), 1e-9)
    recency = 1.0 / np.sqrt(1.0 + np.arange(m))
    promise = likeness + 0.5 * evidence + recency[:, None]
    chosen = dict.fromkeys(sure.tolist())
    ordered = np.argsort(-promise, axis=0, kind="stable")  # (m, n)
    for place in ordered.ravel():  # every item's first, then every item's second, …
        if len(chosen) == most:
            break
        chosen.setdefault(int(place))
    return np.array(sorted(chosen), np.int64)


def clauses(wish: str, most: int = MOST_CLAUSES) -> list[tuple[str, str]]:
    """`(clause, wish without it)` for each part of a wish; none for a wish of one part or of more than `most`.

    Parts end at punctuation and before words that begin another, in English and German.
    """
    ends = [match.span() for match in _CLAUSES.finditer(wish)]
    starts, stops = [0, *(end for _, end in ends)], [*(start for start, _ in ends), len(wish)]
    parts = [(start, stop) for start, stop in zip(starts, stops, strict=True) if wish[start:stop].strip()]
    if not 2 <= len(parts) <= most:
        return []
    found = []
    for number, (start, stop) in enumerate(parts):
        left = " ".join(wish[a:b].strip() for other, (a, b) in enumerate(parts) if other != number)
        found.append((_FILLER.sub("", wish[start:stop].strip()), _FILLER.sub("", left)))
    return found


@dataclass(frozen=True, slots=True)
class Changes:
    """What is tried beside the request as it was; the rows of a batch are in this order.

    `wishes (w, d)` are the wish in item space less a clause each; the whole wish is left out too where `has_wish`.
    """

    removed: Sequence[Sequence[int]] = ()  # rows of the history, an item's events each
    wishes: NDArray[np.float32] | None = None
    has_wish: bool = False
    views: Sequence[FeatureView] = ()

    @property
    def first_wish(self) -> int:
        return 1 + len(self.removed)

    @property
    def first_view(self) -> int:
        return self.first_wish + self.has_wish + (0 if self.wishes is None else len(self.wishes))

    def __len__(self) -> int:
        return self.first_view + len(self.views)


def known_views(inputs: Inputs) -> list[FeatureView]:
    """The feature views of which anything is known: leaving out another would change nothing."""
    return [view for view, mask, columns in _views() if np.asarray(inputs[mask])[..., columns].any()]


def batch(
    inputs: Inputs, places: Sequence[int], changes: Changes, history: History, at: datetime
) -> dict[str, NDArray[np.generic]]:
    """The ranker's inputs for every change and the candidates at `places` of `inputs`, which are those of one request."""
    b = len(changes)
    made: dict[str, NDArray[np.generic]] = {}
    for name, value in inputs.items():
        if name.startswith("candidate_"):
            value = value[:, list(places)]
        made[name] = np.repeat(value, b, axis=0)
    kept = _kept(inputs, history)
    for row, events in enumerate(changes.removed, start=1):
        _leave_out(made, row, inputs, kept, set(events), history, at)
    row = changes.first_wish
    if changes.has_wish:
        made["prompt_vector"][row], made["prompt_mask"][row] = 0.0, 0.0
        row += 1
    if changes.wishes is not None:
        made["prompt_vector"][row : row + len(changes.wishes)] = changes.wishes
    placed = {view.name: (mask, columns) for view, mask, columns in _views()}
    for row, view in enumerate(changes.views, start=changes.first_view):
        mask, columns = placed[view.name]
        made[mask][row, ..., columns] = 0.0
        made[mask.replace("_mask", "_features")][row, ..., columns] = 0.0
    assert all(len(value) == b for value in made.values())
    return made


@dataclass(frozen=True, slots=True)
class Effects:
    """What each change did to each of the k shown items, `(changes, k)`; the request as it was is none of the changes.

    `effect`: the score as it was less the score under the change. `places`: how many places lower the item then stands among
    all that were scored. `lead`: its effect less the mean effect on all of these.
    """

    effect: NDArray[np.float32]
    places: NDArray[np.int64]
    lead: NDArray[np.float32]


def effects(scores: NDArray[np.float32], k: int) -> Effects:
    """Effects from the scores `(1 + changes, n)` of a batch, whose first k items are shown."""
    moved = scores[:1] - scores[1:]
    # (changes, n, k): who stands above a shown item
    above = (scores[:, :, None] > scores[:, None, :k]).sum(axis=1)
    return Effects(moved[:, :k], above[1:] - above[:1], moved[:, :k] - moved.mean(axis=1, keepdims=True))


def _kept(inputs: Inputs, history: History) -> NDArray[np.int64]:
    """The rows of the history that stand in `inputs`, as `ranker_inputs.person_inputs` chose them."""
    dim = inputs["history_vectors"].shape[2]
    rows = [row for row, vector in enumerate(history.vectors) if vector is not None and len(vector) == dim]
    return np.array(rows, np.int64)


def _leave_out(
    made: Mapping[str, NDArray[np.generic]],
    row: int,
    inputs: Inputs,
    kept: NDArray[np.int64],
    events: set[int],
    history: History,
    at: datetime,
) -> None:
    """Make row `row` of the batch the history less `events`: right-aligned, as a shorter one would be."""
    stay = np.array([place for place, event in enumerate(kept.tolist()) if event not in events], np.int64)
    begin = made["history_mask"].shape[1] - len(stay)
    for name in ("history_vectors", "history_kinds", "history_values", "history_mask"):
        made[name][row] = 0
        made[name][row, begin:] = inputs[name][0, stay]
    made["history_gaps"][row] = 0
    if len(stay):
        made["history_gaps"][row, begin:] = history_gaps(history.occurred_at[kept[stay]], at.timestamp())


def _views() -> list[tuple[FeatureView, str, slice]]:
    """Every view, the mask its features stand in, and where there."""
    found = []
    for mask, views in (("context_mask", CONTEXT_VIEWS), ("candidate_mask", (*CANDIDATE_VIEWS, *CROSS_VIEWS))):
        begin = 0
        for view in views:
            found.append((view, mask, slice(begin, begin + len(view.features))))
            begin += len(view.features)
    return found
