"""Exposure against relevance on lists whose shares are known, and intervals that hold what they say."""

from __future__ import annotations

import numpy as np
import pytest

from orchestration.compute.fairness.exposure import (
    LEAST_CHOICES,
    MOST_GROUPS,
    OTHERS,
    GroupExposure,
    bootstrap_weights,
    discounts,
    group_exposure,
)

GROUPS = {"a": {"x": 1.0}, "b": {"y": 1.0}, "both": {"x": 0.5, "y": 0.5}}


def by_name(found: list[GroupExposure]) -> dict[str, GroupExposure]:
    return {one.group: one for one in found}


def test_a_list_spreads_one_unit_and_its_top_gets_more() -> None:
    weight = discounts(3)
    assert weight.sum() == pytest.approx(1)
    assert weight[0] / weight[2] == pytest.approx(2.0)  # log2(4) over log2(2)


def test_shares_and_ratio_are_what_the_lists_say() -> None:
    people = [f"p{n}" for n in range(40)]
    shown = [(who, ["a", "b"]) for who in people]
    chosen = [(who, item) for who in people for item in ("a", "b", "b", "b")]
    found = by_name(group_exposure(GROUPS, shown, chosen, [(people[0], "a")]))
    top = float(discounts(2)[0])
    assert found["x"].exposure == pytest.approx(top)
    assert found["x"].relevance == pytest.approx(0.25)
    assert found["x"].picked == 1.0
    assert found["x"].ratio == pytest.approx(top / 0.25)
    assert found["x"].items == 2
    # Everybody did the same: there is nothing that chance could change.
    assert found["x"].low == pytest.approx(found["x"].ratio)
    assert found["x"].high == pytest.approx(found["x"].ratio)
    assert list(found) == ["y", "x"]


def test_an_item_of_two_groups_counts_half_for_each() -> None:
    people = [f"p{n}" for n in range(40)]
    found = by_name(group_exposure(GROUPS, [(who, ["both"]) for who in people], [(who, "both") for who in people], []))
    assert found["x"].exposure == found["y"].exposure == pytest.approx(0.5)
    assert found["x"].choices == 20
    assert found["x"].ratio is None
    assert str(LEAST_CHOICES) in found["x"].words


def test_a_group_that_few_people_chose_from_is_not_told_of() -> None:
    people = [f"p{n}" for n in range(40)]
    chosen = [(who, "a") for who in people] + [("p0", "b")] * 100
    found = by_name(group_exposure(GROUPS, [(who, ["a", "b"]) for who in people], chosen, []))
    assert found["y"].ratio is None
    assert found["x"].ratio is not None


def test_many_groups_become_others() -> None:
    groups = {f"i{n}": {f"g{n:02}": 1.0} for n in range(50)}
    people = [f"p{n}" for n in range(60)]
    chosen = [(who, f"i{n}") for who in people for n in range(50)]
    found = group_exposure(groups, [(who, [f"i{n}" for n in range(50)]) for who in people], chosen, [])
    assert len(found) == MOST_GROUPS
    assert found[-1].group == OTHERS
    assert sum(one.relevance for one in found) == pytest.approx(1)
    assert sum(one.items for one in found) == 50


def test_the_interval_holds_the_true_ratio() -> None:
    generator = np.random.default_rng(7)
    inside = 0
    rounds = 120
    for number in range(rounds):
        people = [f"p{n}" for n in range(200)]
        shown = [(who, ["a", "b"] if generator.random() < 0.5 else ["b", "a"]) for who in people]
        # Each person leans one way: their choices hang together.
        chosen = [
            (who, "a" if generator.random() < lean else "b")
            for who, lean in zip(people, generator.beta(1, 1, 200), strict=True)
            for _ in range(4)
        ]
        [x] = [one for one in group_exposure(GROUPS, shown, chosen, [], seed=number, resamples=300) if one.group == "x"]
        assert x.low is not None
        assert x.high is not None
        inside += x.low <= 1.0 <= x.high
    assert inside / rounds >= 0.9  # 97.5 % each, of two groups


def test_bootstrap_weights_are_as_many_as_asked_for() -> None:
    weights = list(bootstrap_weights(7, 1, 120))
    assert sum(len(one) for one in weights) == 120
    assert weights[0].shape == (50, 7)
    assert np.concatenate(weights).mean() == pytest.approx(1, abs=0.1)
