"""Exposure against relevance: what share of the eyes a group of items gets, and what share of the choices it earns.

Exposure falls with the position as DCG's discount does, and a request spreads one unit of it over its list. Relevance is
taken from all that people chose in the same days, wherever they found it. The ratio of both shares is Singh & Joachims'
(2018) disparate treatment; its interval is a bootstrap over people, since what one person sees and chooses hangs together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1_000
LEAST_CHOICES = 30
"""Choices of a group's items below which its ratio says nothing."""
LEAST_PEOPLE = 20
"""A group that fewer people chose from, or a segment of fewer people, is not shown: it comes near to naming them."""
MOST_GROUPS = 20
OTHERS = "(others)"
_PIECE = 50

Groups = Mapping[str, Mapping[str, float]]
"""Of each item, its groups and how much of it is in each: the parts of one item add up to 1."""


@dataclass(frozen=True, slots=True)
class GroupExposure:
    """Shares of a group; `low` to `high` is the interval of `ratio` = exposure over relevance, and `words` why there is none."""

    group: str
    items: int
    exposure: float
    relevance: float
    picked: float
    ratio: float | None
    low: float | None
    high: float | None
    choices: int
    words: str = ""


def discounts(places: int) -> NDArray[np.float64]:
    """`(places,)`: the share of a list's exposure that each position gets."""
    weight = 1 / np.log2(np.arange(2, places + 2))
    return np.asarray(weight / weight.sum()) if places else weight


def group_exposure(
    groups: Groups,
    shown: Sequence[tuple[str, Sequence[str]]],
    chosen: Sequence[tuple[str, str]],
    picked: Sequence[tuple[str, str]],
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[GroupExposure]:
    """What each group gets and earns, the largest relevance first; at most `MOST_GROUPS`, the others as one.

    `shown` is (person, items in order) of each request; `chosen` (person, item) of everything that people chose, `picked` of
    what requests led to. The intervals hold for all groups together at `level` (Bonferroni).
    """
    sizes: dict[str, float] = {}
    for _, item in chosen:
        for group, part in groups.get(item, {}).items():
            sizes[group] = sizes.get(group, 0.0) + part
    for _, items in shown:
        for item in items:
            for group in groups.get(item, {}):
                sizes.setdefault(group, 0.0)
    names = sorted(sizes, key=lambda group: (-sizes[group], group))
    if len(names) > MOST_GROUPS:
        names = [*names[: MOST_GROUPS - 1], OTHERS]
    place = {name: number for number, name in enumerate(names)}
    people = {person: number for number, person in enumerate(dict.fromkeys(p for p, _ in (*shown, *chosen)))}
    exposure, relevance, led = (np.zeros((len(people), len(names))) for _ in range(3))
    for person, items in shown:
        for item, weight in zip(items, discounts(len(items)), strict=True):
            _add(exposure[people[person]], groups.get(item, {}), float(weight), place)
    for into, pairs in ((relevance, chosen), (led, picked)):
        for person, item in pairs:
            if person in people:
                _add(into[people[person]], groups.get(item, {}), 1.0, place)
    members = np.zeros(len(names), np.int64)
    for parts in groups.values():
        for group in parts:
            if (number := place.get(group, place.get(OTHERS))) is not None:
                members[number] += 1
    share = level_of_each(level, len(names))
    low, high = _interval(exposure, relevance, share, seed, resamples)
    shares = [_shares(matrix.sum(axis=0)) for matrix in (exposure, relevance, led)]
    found = []
    for number, name in enumerate(names):
        gets, earns, leads = (float(values[number]) for values in shares)
        choices, choosers = round(float(relevance[:, number].sum())), int((relevance[:, number] > 0).sum())
        words = ""
        if choices < LEAST_CHOICES or choosers < LEAST_PEOPLE:
            words = f"fewer than {LEAST_CHOICES} choices or {LEAST_PEOPLE} people"
        ratio, least, most = (None,) * 3 if words else (gets / earns, float(low[number]), float(high[number]))
        found.append(GroupExposure(name, int(members[number]), gets, earns, leads, ratio, least, most, choices, words))
    return found


def level_of_each(level: float, groups: int) -> float:
    """The level of each of so many intervals that hold together at `level`."""
    return 1 - (1 - level) / max(groups, 1)


def bootstrap_weights(people: int, seed: int, resamples: int) -> Iterator[NDArray[np.float64]]:
    """`(b, people)` weights, some rows at a time and `resamples` in all: each person counts Poisson(1) times."""
    generator = np.random.default_rng(seed)
    for begin in range(0, resamples, _PIECE):
        yield generator.poisson(1.0, (min(_PIECE, resamples - begin), people)).astype(np.float64)


def _interval(
    exposure: NDArray[np.float64], relevance: NDArray[np.float64], level: float, seed: int, resamples: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`low (g,)`, `high (g,)` of the ratio of shares."""
    ratios = []
    for weight in bootstrap_weights(len(exposure), seed, resamples):
        gets, earns = _shares(weight @ exposure), _shares(weight @ relevance)
        ratios.append(gets / np.maximum(earns, 1e-12))
    low, high = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _shares(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(values / np.maximum(values.sum(axis=-1, keepdims=True), 1e-12))


def _add(row: NDArray[np.float64], parts: Mapping[str, float], weight: float, place: Mapping[str, int]) -> None:
    for group, part in parts.items():
        number = place.get(group, place.get(OTHERS))
        if number is not None:
            row[number] += weight * part
