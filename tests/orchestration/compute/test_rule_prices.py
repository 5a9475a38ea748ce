"""What a rule costs is what the same labels lose by it, and nothing where it asks for nothing."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from inference.rules import Rules, parse_rules
from orchestration.compute.evaluate import evaluate, gain, score_popularity
from orchestration.compute.interactions import Interactions
from orchestration.compute.rule_prices import DIVERSITIES, RulePrices, price
from orchestration.compute.splits import Split, time_split

ITEMS, K = 50, 10
SCORES = np.random.default_rng(1).random(ITEMS).astype(np.float32)
CATALOGUE = [(["even" if item % 2 == 0 else "odd"], {"year": 1980 + item}) for item in range(ITEMS)]
VECTORS = np.eye(ITEMS, dtype=np.float32)


@pytest.fixture(scope="module")
def split() -> Split:
    generator = np.random.default_rng(0)
    n = 1200
    user = np.sort(generator.integers(0, 60, n))
    at = generator.integers(0, 10**6, n) * 10**6
    order = np.lexsort((at, user))
    return time_split(
        Interactions(
            np.array([f"u{number:02}" for number in range(60)]),
            np.array([f"i{number:02}" for number in range(ITEMS)]),
            user.astype(np.int32),
            generator.integers(0, ITEMS, n).astype(np.int32),
            at[order],
            np.ones(n, np.int64),
            np.full(n, np.nan, np.float32),
        )
    )


def prices(split: Split, rules: Rules, vectors: NDArray[np.float32] = VECTORS) -> RulePrices:
    return price(rules, score_popularity(SCORES), split.queries, CATALOGUE, vectors, k=K)


def test_without_rules_the_figure_is_that_of_the_evaluation(split: Split) -> None:
    found = prices(split, parse_rules(""))
    judged = evaluate({"ranker": score_popularity(SCORES)}, split).row("ranker")
    assert found.labels == len(split.queries)
    assert found.ndcg_at_10 == pytest.approx(judged.ndcg[10])
    assert [row.rule for row in found.rows] == [f"diversity {setting:g}" for setting in DIVERSITIES]
    # Items of which none is like another leave diversity nothing to do.
    assert all(row.price.mean == pytest.approx(0) for row in found.rows)


def test_a_rule_that_forbids_nothing_costs_nothing(split: Split) -> None:
    found = prices(split, parse_rules('[quotas.all]\ncategory = "even"\nat_most = 10'))
    assert (found.rows[0].rule, found.rows[0].price.mean, found.rows[0].shown_mean) == ("quotas.all", 0.0, 10.0)


def test_a_filter_costs_what_the_labels_it_forbids_were_worth_less_what_others_gain(split: Split) -> None:
    found = prices(split, parse_rules('[filters.late]\nattribute = "year"\nat_least = 2005'))
    masked = np.where(np.arange(ITEMS) >= 25, SCORES, np.float32(-1))
    ranks = evaluate({"late": score_popularity(masked)}, split).row("late").ranks
    worth = np.where(split.queries.target >= 25, gain(ranks, K), 0.0)
    row = found.rows[0]
    assert row.ndcg_at_10 == pytest.approx(float(worth.mean()))
    assert row.price.mean == pytest.approx(found.ndcg_at_10 - row.ndcg_at_10)
    assert row.price.low <= row.price.mean <= row.price.high


def test_a_slate_that_a_quota_leaves_short_is_reported_so(split: Split) -> None:
    text = '[quotas.e]\ncategory = "even"\nat_most = 2\n[exposure.o]\ncategory = "odd"\ncap = 0.3'
    found = {row.rule: row for row in prices(split, parse_rules(text)).rows}
    assert found["quotas.e"].shown_mean == 10
    assert found["all rules"].shown_mean == 5
    assert found["all rules"].ndcg_at_10 <= min(found["quotas.e"].ndcg_at_10, found["exposure.o"].ndcg_at_10) + 1e-9


def test_what_the_labels_cannot_tell_is_said(split: Split) -> None:
    found = prices(split, parse_rules("not_again_days = 3"))
    assert found.not_priced == ("not_again_days",)
    assert "not_again_days is not priced" in found.table()
