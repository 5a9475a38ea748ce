"""What a ranker would be worth if it were shown, from lists that another one showed: counterfactual estimates from explored
lists.

The log holds, for each shown item, the probability of showing it at its place given those before it (Plackett-Luce
exploration). A candidate ranker gives the same items other probabilities; the ratio is a weight that makes the lists that
were shown stand for those the candidate would show. All estimates are of the rewards (clicks) of a list, place by place:

    cascade     what happens at a place depends on the items up to it: its weight is the product of the ratios so far
                (McInerney et al. 2020, RIPS; the default)
    slate       anything may depend on anything: every place weighs as the whole list does

IPS is the weighted mean (Horvitz & Thompson 1952), SNIPS divides by the weights instead of the count (Swaminathan & Joachims
2015), DR adds a model of the rewards that was learned on other people and corrects it by what was seen (Dudík, Langford & Li
2011; for lists under a cascade Kiyohara et al. 2022). Intervals come from influence functions summed per person: lists of one
person are one observation.

Weights cannot speak of lists that were never shown. `evaluate` refuses, and says why, where support is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from orchestration.compute.reward_model import RewardModel, fit_rewards
from schemas.errors import LarderError

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Assumption = Literal["cascade", "slate"]

LEVEL = 0.95
LEAST_PEOPLE = 200
"""Fewer make no interval."""
LEAST_EFFECTIVE = 100.0
"""Effective lists at the last place judged (Kong 1992): below, one lucky list moves everything."""
MOST_WEIGHT = 100.0
"""Weights are cut there: what is lost is a bias that is reported, what is won is that no list counts for a hundred."""
MOST_CLIPPED_RATE = 0.05
"""Of all weight: if more is cut, the bias is no longer small beside the interval."""
SUPPORT_Z = 4.0
"""Weights have mean 1 where the log could have shown all that the candidate shows. So many standard errors away from it
happens by chance once in 16,000 times."""


class NoSupport(LarderError):
    """The log cannot tell what the candidate is worth."""

    type = "no_support"


@dataclass(frozen=True, slots=True)
class Logged:
    """n explored lists of k places, each drawn from a pool of at most m candidates."""

    shown: Ints
    """(n, k) int64, index in the pool; −1 where the list is shorter"""
    propensities: Array
    """(n, k) float64, of each shown item at its place given those before it"""
    there: NDArray[np.bool_]
    """(n, m), which places of the pool hold a candidate"""
    scores: Array
    """(n, m) float64, as logged"""
    rewards: Array
    """(n, k) float64, 1 for a click"""
    person: Ints
    """(n,) int64, whose list it was"""

    def first(self, places: int) -> Logged:
        """The same lists, cut after so many places."""
        return Logged(
            self.shown[:, :places],
            self.propensities[:, :places],
            self.there,
            self.scores,
            self.rewards[:, :places],
            self.person,
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected rewards, with an interval of 95 %."""

    value: float
    low: float
    high: float
    se: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a candidate is worth per list of `places` places. `dr_rows (n,)` are DR's terms, one a list: what differences
    between candidates are made of.

    `shown` is what the logged lists got. `by_place` is SNIPS and DR at each place. `effective` is the effective number of
    lists at the last place, `clipped_rate` the share of all weight that was cut.
    """

    assumption: Assumption
    places: int
    lists: int
    people: int
    shown: Estimate
    ips: Estimate
    snips: Estimate
    dr: Estimate
    by_place: tuple[tuple[Estimate, Estimate], ...]
    effective: float
    clipped_rate: float
    dr_rows: Array
    person: Ints

    def words(self) -> str:
        """The estimate as a sentence."""
        return (
            f"{self.dr.value:.3f} clicks per list of {self.places} ({self.dr.low:.3f} to {self.dr.high:.3f}; the lists that were "
            f"shown got {self.shown.value:.3f}), from {self.lists:,} explored lists of {self.people:,} people, worth {self.effective:,.0f}"
        )


def evaluate(
    logged: Logged,
    scores: Array,
    *,
    temperature: float = 0.0,
    assumption: Assumption = "cascade",
    most_weight: float = MOST_WEIGHT,
) -> Evaluation:
    """The value of a ranker that gives the logged candidates `scores (n, m)`, shown in their order; with a `temperature`,
    explored as `inference` explores.

    Raises NoSupport where the log cannot tell.
    """
    people = len(np.unique(logged.person))
    _check(logged, people)
    steps = target_steps(logged, scores, temperature)
    ratios = np.where(logged.shown >= 0, steps.probability / logged.propensities, 1.0)
    raw = np.asarray(np.cumprod(ratios, axis=1), np.float64)
    if assumption == "slate":
        raw = np.broadcast_to(raw[:, -1:], raw.shape)
    weights = np.minimum(raw, most_weight)
    _check_support(raw, weights, logged.person)
    clipped_rate = float(1 - weights.sum() / raw.sum())
    if clipped_rate > MOST_CLIPPED_RATE:
        raise NoSupport(
            f"{clipped_rate:.1%} of the weight lies in lists that count more than {most_weight:g} times; the candidate shows what "
            "exploration hardly ever did: explore more, or judge fewer places"
        )
    model = fit_rewards(logged.shown, logged.scores, scores, logged.there, logged.rewards, logged.person)
    terms = _dr_terms(logged, weights, steps, model, assumption)
    ips_rows = weights * logged.rewards
    n = len(weights)
    snips, snips_rows = _self_normalised(weights, logged.rewards)
    places = range(logged.shown.shape[1])
    return Evaluation(
        assumption=assumption,
        places=len(places),
        lists=n,
        people=people,
        shown=mean_of(logged.rewards.sum(1), logged.person),
        ips=mean_of(ips_rows.sum(1), logged.person),
        snips=_estimate(float(snips.sum()), snips_rows.sum(1), logged.person),
        dr=mean_of(terms.sum(1), logged.person),
        by_place=tuple(
            (
                _estimate(float(snips[place]), snips_rows[:, place], logged.person),
                mean_of(terms[:, place], logged.person),
            )
            for place in places
        ),
        effective=effective_lists(weights[:, -1]),
        clipped_rate=clipped_rate,
        dr_rows=terms.sum(1),
        person=logged.person,
    )


def difference(one: Evaluation, other: Evaluation) -> Estimate:
    """How much more `one` is worth than `other`, of two candidates judged on the same lists (doubly robust)."""
    return mean_of(one.dr_rows - other.dr_rows, one.person)


@dataclass(frozen=True, slots=True)
class Steps:
    """A candidate's choices along the lists that were shown.

    `probability (n, k)` of each shown item given those before it. `choices (n, k, c)` are the items the candidate might
    show instead there and `chances (n, k, c)` how likely; `own (n, k)` its own list in order, −1 past the pool's end.
    """

    probability: Array
    choices: Ints
    chances: Array
    own: Ints


def target_steps(logged: Logged, scores: Array, temperature: float = 0.0) -> Steps:
    """What a ranker with these `scores (n, m)` would do at each place, the items before it being those that were shown."""
    n, k = logged.shown.shape
    m = scores.shape[1]
    row = np.arange(n)
    free = logged.there.copy()
    usable = np.where(logged.there, scores, -np.inf)
    order = np.argsort(-usable, axis=1, kind="stable")[:, :k]
    own = np.where(np.take_along_axis(logged.there, order, axis=1), order, -1)
    probability = np.ones((n, k))
    width = 1 if temperature == 0 else m
    choices, chances = np.zeros((n, k, width), np.int64), np.zeros((n, k, width))
    for place in range(k):
        taken = logged.shown[:, place]
        here = taken >= 0
        left = np.where(free, usable, -np.inf)
        if temperature == 0:
            top = left.argmax(axis=1)
            probability[:, place] = np.where(here, top == taken, 1.0)
            choices[:, place, 0], chances[:, place, 0] = top, here
        else:
            highest = np.max(left, axis=1, initial=-1e300, keepdims=True)
            weight = np.exp((left - highest) / temperature)
            share = weight / weight.sum(axis=1, keepdims=True)
            probability[:, place] = np.where(here, share[row, taken], 1.0)
            choices[:, place], chances[:, place] = np.arange(m), share * here[:, None]
        free[row[here], taken[here]] = False
    return Steps(probability, choices, chances, own)


def effective_lists(weights: Array) -> float:
    """Kong's effective sample size of `weights (n,)`."""
    square = float((weights**2).sum())
    return float(weights.sum()) ** 2 / square if square else 0.0


def mean_of(rows: Array, person: Ints) -> Estimate:
    """The mean of `rows (n,)` with an interval over people."""
    value = float(rows.mean())
    return _estimate(value, rows - value, person)


def _estimate(value: float, influence: Array, person: Ints) -> Estimate:
    """`influence (n,)`: what each list moves the estimate by, times n; its sum over a person is one observation."""
    _, who = np.unique(person, return_inverse=True)
    sums = np.bincount(who, weights=influence)
    people = len(sums)
    se = float(np.sqrt((sums**2).sum() * people / max(people - 1, 1)) / len(influence))
    room = float(student.ppf((1 + LEVEL) / 2, max(people - 1, 1))) * se
    return Estimate(value, value - room, value + room, se)


def _self_normalised(weights: Array, rewards: Array) -> tuple[Array, Array]:
    """`(k,)` SNIPS at each place, and its influence `(n, k)`."""
    mean = weights.mean(axis=0)
    value = (weights * rewards).mean(axis=0) / mean
    return np.asarray(value), np.asarray(weights * (rewards - value) / mean)


def _dr_terms(logged: Logged, weights: Array, steps: Steps, model: RewardModel, assumption: Assumption) -> Array:
    """`(n, k)`: the doubly robust term of each list at each place.

    With w the weights, q the model's reward of an item at a place, and g what it says of the candidate's own list there:
    g (1 − w before) + (w before) E q(candidate's choice) − w q(shown) + w r. Its mean is the value whatever q and g are, as
    long as the weights are right; it varies little where they are good.
    """
    k = weights.shape[1]
    terms = np.empty_like(weights)
    for place in range(k):
        own = model.of(place, steps.own[:, place, None])[:, 0]
        shown = model.of(place, logged.shown[:, place, None])[:, 0]
        if assumption == "slate":
            # One weight for the whole list: nothing is known of it before it is complete.
            terms[:, place] = own + weights[:, place] * (logged.rewards[:, place] - own)
            continue
        before = weights[:, place - 1] if place else np.ones(len(weights))
        expected = (steps.chances[:, place] * model.of(place, steps.choices[:, place])).sum(axis=1)
        terms[:, place] = own * (1 - before) + before * expected
        terms[:, place] += weights[:, place] * (logged.rewards[:, place] - shown)
    return terms


def _check(logged: Logged, people: int) -> None:
    n, k = logged.shown.shape
    if not n or not k:
        raise NoSupport(
            "no explored list is in the log; set an arm's exploration in experiments.toml, or the function's, above 0"
        )
    if people < LEAST_PEOPLE:
        raise NoSupport(
            f"explored lists of {people} people are too few; at least {LEAST_PEOPLE} are needed: wait for more"
        )
    p = logged.propensities[logged.shown >= 0]
    if not (np.isfinite(p) & (p > 0) & (p <= 1 + 1e-6)).all():
        raise NoSupport(
            f"{int((~((p > 0) & (p <= 1 + 1e-6))).sum())} propensities lie outside 0–1; the log was written by something else than exploration"
        )


def _check_support(raw: Array, weights: Array, person: Ints) -> None:
    """Raise NoSupport at the first place where the weights, before and after the cut, show that log and candidate do not
    meet."""
    for place in range(weights.shape[1]):
        enough = f"judge the first {place} places only, or explore more" if place else "explore more"
        column = raw[:, place]
        effective = effective_lists(weights[:, place])
        if effective < LEAST_EFFECTIVE:
            raise NoSupport(
                f"of {len(column):,} lists only {effective:,.0f} are as the candidate's up to place {place + 1}; at least "
                f"{LEAST_EFFECTIVE:.0f} are needed: {enough}"
            )
        found = mean_of(column, person)
        away = (found.value - 1) / found.se if found.se > 0 else 0.0
        if away < -SUPPORT_Z:
            raise NoSupport(
                f"the log covers {found.value:.0%} of what the candidate shows up to place {place + 1}: the rest could not have been "
                f"shown, or the pool that was logged lacks it; {enough}"
            )
        if away > SUPPORT_Z:
            raise NoSupport(
                f"weights at place {place + 1} have a mean of {found.value:.2f} instead of 1: the logged propensities are smaller than "
                "what was really done, so no estimate from them holds"
            )
