"""Explored slates: drawn as Plackett and Luce say, the propensity of each place exact, the same for the same request."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from inference.explore import POOL, draw, explores, gumbel
from inference.rerank import best, maximal_marginal_relevance

SCORES = np.array([0.4, 1.0, -0.3, 0.7], np.float32)


def vectors(n: int, d: int = 3) -> NDArray[np.float32]:
    made = np.random.default_rng(5).normal(size=(n, d))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def enumerated(
    scores: NDArray[np.float32],
    k: int,
    temperature: float,
    like: NDArray[np.float32] | None = None,
    diversity: float = 0.0,
) -> dict[tuple[int, ...], list[float]]:
    """Of every ordered slate the probability of each place given those before it, written out as the definition has it."""
    spread = float(scores.max() - scores.min())
    found: dict[tuple[int, ...], list[float]] = {}
    for slate in itertools.permutations(range(len(scores)), k):
        chances = []
        for place in range(k):
            before = slate[:place]

            def value(item: int, before: tuple[int, ...] = before) -> float:
                if like is None:
                    return float(scores[item]) / temperature
                near = max((float(like[item] @ like[other]) for other in before), default=0.0)
                return ((1 - diversity) * float(scores[item]) - diversity * spread * max(near, 0.0)) / temperature

            left = [item for item in range(len(scores)) if item not in before]
            chances.append(math.exp(value(slate[place])) / sum(math.exp(value(item)) for item in left))
        found[slate] = chances
    return found


@pytest.mark.parametrize("diversity", [0.0, 0.4])
def test_slates_come_as_often_as_enumeration_says_and_know_their_propensities(diversity: float) -> None:
    like = vectors(4) if diversity else None
    expected = enumerated(SCORES, 3, 0.5, like, diversity)
    assert sum(math.prod(chances) for chances in expected.values()) == pytest.approx(1)
    counted: Counter[tuple[int, ...]] = Counter()
    draws = 6_000
    for number in range(draws):
        drawn = draw(f"request-{number}", SCORES, 3, like, diversity, temperature=0.5)
        slate = tuple(drawn.order.tolist())
        counted[slate] += 1
        assert drawn.propensities == pytest.approx(expected[slate], rel=1e-5)
    frequencies = [counted[slate] for slate in expected]
    assert stats.chisquare(frequencies, [draws * math.prod(chances) for chances in expected.values()]).pvalue > 0.001


def test_an_equal_request_gets_an_equal_slate_and_another_one_another() -> None:
    scores = np.random.default_rng(1).normal(size=300).astype(np.float32)
    one, again, other = (draw(name, scores, 10) for name in ("r", "r", "s"))
    np.testing.assert_array_equal(one.order, again.order)
    assert one.order.tolist() != other.order.tolist()


def test_the_noise_is_what_it_was() -> None:
    """A golden value: logged propensities are worth something only while a request can be drawn again."""
    np.testing.assert_allclose(
        gumbel("r", 1, 3), [[-0.04425961471465793, 0.6531300052544209, 0.9915719120220327]], rtol=1e-12
    )
    assert stats.kstest(gumbel("many", 50, 100).ravel(), "gumbel_r").pvalue > 0.001


def test_without_heat_it_is_the_ranking() -> None:
    scores = np.random.default_rng(2).normal(size=60).astype(np.float32)
    like = vectors(60)
    assert draw("r", scores, 10, temperature=1e-6).order.tolist() == best(scores, 10).tolist()
    ranked = maximal_marginal_relevance(scores, like, 10, 0.3)
    assert draw("r", scores, 10, like, 0.3, temperature=1e-6).order.tolist() == ranked.tolist()


def test_only_the_pool_is_drawn_from_and_no_item_twice() -> None:
    scores = np.random.default_rng(3).normal(size=400).astype(np.float32)
    pool = set(best(scores, POOL).tolist())
    seen: set[int] = set()
    for number in range(100):
        order = draw(f"{number}", scores, POOL, temperature=50).order.tolist()
        assert len(set(order)) == POOL
        assert set(order) <= pool
        seen |= set(draw(f"{number}", scores, 10, temperature=50).order.tolist())
    assert len(seen) > 90


@pytest.mark.parametrize(("n", "k", "slate"), [(0, 10, 0), (1, 10, 1), (5, 10, 5)])
def test_few_candidates_are_all_drawn(n: int, k: int, slate: int) -> None:
    drawn = draw("r", np.linspace(1, 2, n).astype(np.float32), k, np.eye(5, dtype=np.float32)[:n], 0.5)
    assert sorted(drawn.order.tolist()) == list(range(slate))
    assert len(drawn.propensities) == slate
    if slate:
        assert drawn.propensities[-1] == pytest.approx(1), "the last one left has no rival"


def test_the_share_of_requests_is_kept_and_is_always_the_same_ones() -> None:
    names = [f"request-{number}" for number in range(20_000)]
    few = {name for name in names if explores(name, 0.02)}
    assert stats.binomtest(len(few), len(names), 0.02).pvalue > 0.001
    assert few < {name for name in names if explores(name, 0.2)}
    assert not any(explores(name, 0) for name in names[:100])
    assert all(explores(name, 1) for name in names[:100])
