"""Places among rows by key and instant, against counting, whether or not both fit into one number."""

from __future__ import annotations

import numpy as np
import pytest

from orchestration.compute.order import Order


@pytest.mark.parametrize("many_keys", [1, 1 << 20])  # the second: key and instant need more than 62 bits
def test_a_place_is_how_many_rows_come_before(many_keys: int) -> None:
    rng = np.random.default_rng(0)
    key, instant = rng.integers(0, 6, 300) * many_keys, rng.integers(0, 40, 300) * (1 << 40)
    order = Order(key, instant)
    assert (order._instants is None) == (many_keys == 1)
    asked = np.concatenate([rng.integers(0, 7, 200) * many_keys, key])
    at = np.concatenate([rng.integers(-2, 43, 200) * (1 << 40) + rng.integers(-1, 2, 200), instant])
    counted = np.array([np.sum((key < k) | ((key == k) & (instant <= t))) for k, t in zip(asked, at, strict=True)])
    assert order.place(asked, order.rank(at)).tolist() == counted.tolist()
    by_both, places = order.in_order(asked, at)
    assert places.tolist() == counted[by_both].tolist()
    ranked = list(zip(asked.tolist(), order.rank(at).tolist(), strict=True))
    assert [ranked[number] for number in by_both] == sorted(ranked)
    assert order.keys.tolist() == sorted(key)
    assert instant[order.rows][order.keys == 0].tolist() == sorted(instant[key == 0])


def test_without_rows_every_place_is_the_first() -> None:
    none = np.zeros(0, np.int64)
    order = Order(none, none)
    assert order.place(np.array([0, 3]), order.rank(np.array([-5, 5]))).tolist() == [0, 0]
