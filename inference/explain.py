"""Reasons in plain words, and beside each what it rests on: what was tried and moved the score, or what merely is alike.

A kind of reason has one template. A reason that was tried says so by its figures in `because`; the sentence stays short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inference.candidates import SOURCES, Candidates
from inference.store import History
from schemas.events import LIKED_VALUE, NEGATIVE_KINDS
from schemas.serving import Because
from schemas.views import CANDIDATE_VIEWS, CONTEXT_VIEWS

MOST_REASONS = 3
LIKE_ENOUGH = 0.3
"""Below this cosine in item space two items have nothing to do with each other."""
TOLD_RATE = 0.1
"""What moved the score by less than this share of the greatest effect on it is not put in words."""
LEAST_EFFECT = 0.05
"""Logits below which a difference is not put in words either."""

_LISTS = {
    "trending": "trending this week",
    "new": "new",
    "popular": "popular",
    "ahead": "chosen for you a while ago",
}


@dataclass(frozen=True, slots=True)
class Explained:
    """Why one item is shown: sentences, and what they rest on."""

    reasons: tuple[str, ...]
    because: tuple[Because, ...]


def tried(because: Sequence[Because], sources: int, history: History, wish: str | None = None) -> Explained:
    """The explanation of an item of which everything in `because` was tried; the lists it comes from are added.

    `wish` are the words of the whole wish. An event is put in words only if the item would stand lower without it: of 68
    trained people, such an event cost the item more places than another in 94 % of comparisons when the request was made
    again without it; the event of the greatest effect alone did so in 66 %.
    """
    ordered = sorted(because, key=lambda one: (-(one.places or 0), -(one.effect or 0.0)))
    most = max((one.effect or 0.0 for one in ordered), default=0.0)
    least = max(TOLD_RATE * most, LEAST_EFFECT)
    told = [
        one
        for one in ordered
        if (one.effect or 0.0) > 0 and ((one.places or 0) > 0 or (one.kind != "event" and (one.effect or 0.0) > least))
    ]
    # The whole wish says nothing more where a clause of it is named.
    if any(one.kind == "wish" and one.words != wish for one in told):
        told = [one for one in told if one.kind != "wish" or one.words != wish]
    added = listed(sources)
    sentences = [sentence(one, history) for one in (*told, *added)][:MOST_REASONS]
    return Explained(tuple(sentences) or (_LISTS["popular"],), (*ordered, *added))


def plain_slate(
    candidates: Candidates, order: NDArray[np.int64], history: History, wish: str | None
) -> list[Explained]:
    """`plain` for every shown item, `order (k,)` being their places among the candidates."""
    rows = [
        row
        for row, vector in enumerate(history.vectors)
        if vector is not None and history.titles[row] and speaks_for(history.kinds[row], history.values[row])
    ]
    past = np.stack(
        [vector for row in rows if (vector := history.vectors[row]) is not None] or [np.zeros(1, np.float32)]
    )
    return [
        plain(
            candidates.vectors[index],
            int(candidates.sources[index]),
            history,
            (wish, float(candidates.wish[index])),
            past=past,
            past_rows=rows,
        )
        for index in order.tolist()
    ]


def plain(
    vector: NDArray[np.float32],
    sources: int,
    history: History,
    wish: tuple[str | None, float],
    *,
    past: NDArray[np.float32],
    past_rows: list[int],
) -> Explained:
    """Up to three reasons for one item of which nothing was tried: what is alike, and where it comes from.

    `vector (d,)` is the item's; `past (m, d)` the vectors of the history rows `past_rows`; `wish` its words and the cosine
    of its text and the item's, 0 without one.
    """
    found: list[tuple[float, str, Because]] = []
    words, fit = wish
    if fit >= LIKE_ENOUGH:
        found.append((fit + 0.2, f"fits your wish ({fit:.0%})", Because(kind="wish", words=words)))
    if len(past_rows) and vector.any():
        likeness = past @ vector
        nearest = int(np.argmax(likeness))
        if (match := float(likeness[nearest])) >= LIKE_ENOUGH:
            row = past_rows[nearest]
            one = Because(kind="event", item_id=history.item_ids[row], title=history.titles[row])
            found.append((match, sentence(one, history), one))
    weights = {"co_visitation": 0.35, "new": 0.15, "trending": 0.1, "ahead": 0.05}
    found += [(weights[one.kind], sentence(one, history), one) for one in listed(sources)]
    found.sort(key=lambda entry: -entry[0])
    if not found:
        return Explained((_LISTS["popular"],), (Because(kind="popular"),))
    return Explained(tuple(text for _, text, _ in found[:MOST_REASONS]), tuple(one for _, _, one in found))


def listed(sources: int) -> list[Because]:
    """The lists and counts that an item comes from."""
    found = []
    if sources & SOURCES["co_visitation"]:
        found.append(Because(kind="co_visitation"))
    if sources & SOURCES["fresh"]:
        found.append(Because(kind="new"))
    if sources & SOURCES["trending"]:
        found.append(Because(kind="trending"))
    if sources & SOURCES["ahead"]:
        found.append(Because(kind="ahead"))
    return found


def sentence(one: Because, history: History) -> str:
    """One reason in words."""
    if one.kind == "event":
        rows = [row for row, item_id in enumerate(history.item_ids) if item_id == one.item_id]
        people = f"; {one.people_both} people had both" if one.people_both and one.people_both > 1 else ""
        if any(_against(history.kinds[row], history.values[row]) for row in rows[-1:]):
            return f"“{one.title}”{_said(history, rows)}, led to it{people}"
        return f"like “{one.title}”{_said(history, rows)}{people}"
    if one.kind == "wish":
        return f"your wish: {one.words}"
    if one.kind == "features":
        return _VIEWS.get(one.view or "", f"what {one.view} says")
    if one.kind == "co_visitation":
        return "people who had your last items went on to it"
    return _LISTS[one.kind]


_VIEWS = {
    **{view.name: "how active you have been lately" for view in CONTEXT_VIEWS},
    **{view.name: "how it has been received lately" for view in CANDIDATE_VIEWS},
    "user_affinity": "what you make of its categories",
}
"""What a feature view is to the person; one without a template is called by its name."""


def _against(kind: str, value: float | None) -> bool:
    return kind in NEGATIVE_KINDS or (kind == "rating" and value is not None and value < LIKED_VALUE)


def speaks_for(kind: str, value: float | None) -> bool:
    """Whether an event is a reason to be shown something alike: nothing hidden, nothing rated low."""
    return not _against(kind, value)


def _said(history: History, rows: Sequence[int]) -> str:
    """What the person did with an item, by what says most: a rating before a like before a view."""
    kinds = {history.kinds[row]: history.values[row] for row in rows}
    value = kinds.get("rating")
    if value is not None:
        return f", which you gave {value:g}"
    for kind, words in (("purchase", "bought"), ("like", "liked"), ("hide", "hid")):
        if kind in kinds:
            return f", which you {words}"
    return ", which you had"
