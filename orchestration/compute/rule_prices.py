"""What rules and diversity cost: NDCG of the same labels with each of them and without, from scores computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from inference.rerank import choose
from inference.rules import NO_RULES, Rules, bits_of
from orchestration.compute.baselines import floors
from orchestration.compute.evaluate import Gain, Scorer, aligned, best_items, gain, interval
from orchestration.compute.interactions import Interactions
from orchestration.compute.lake import Lake
from orchestration.compute.learn import RERANKED, TRAINED_PATH, load_learned
from orchestration.compute.point_in_time import PointInTime
from orchestration.compute.slates import Slates
from orchestration.compute.splits import Queries, Split
from orchestration.compute.training_set import load_categories, load_training_set

POOL = 200
"""The best candidates that a rule chooses among, as serving's are re-ranked."""
PRICED_LABELS = 1_000
"""Labels at most, chosen by seed: each takes the features of the re-ranked items."""
DIVERSITIES = (0.2, 0.5, 0.8)
"""Settings of a request's `diversity` that are priced."""

Described = tuple[Sequence[str], Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class RulePrice:
    """NDCG@10 with one rule (or setting) and nothing else; `price` is what it is lower than without any, with the paired 95 %
    interval over people. `shown_mean` is the mean length of a slate of 10."""

    rule: str
    ndcg_at_10: float
    price: Gain
    shown_mean: float


@dataclass(frozen=True, slots=True)
class RulePrices:
    """Prices on some labels. `not_priced` are rules on which these labels cannot tell."""

    labels: int
    ndcg_at_10: float
    rows: tuple[RulePrice, ...]
    not_priced: tuple[str, ...]

    def table(self) -> str:
        """The figures as aligned text."""
        lines = [["rule", "NDCG@10", "price", "95 %", "items shown"]]
        lines.append(["none", f"{self.ndcg_at_10:.4f}", "", "", "10.0"])
        for row in self.rows:
            price = row.price
            figures = [f"{row.ndcg_at_10:.4f}", f"{price.mean:+.4f}", f"{price.low:+.4f}–{price.high:+.4f}"]
            lines.append([row.rule, *figures, f"{row.shown_mean:.1f}"])
        text = f"{aligned(lines)}\n{self.labels} labels, one rule at a time, then all"
        for name in self.not_priced:
            text += f"\n{name} is not priced: the labels do not know what was shown before"
        return text


def price(
    rules: Rules,
    scorer: Scorer,
    queries: Queries,
    catalogue: Sequence[Described],
    vectors: NDArray[np.float32],
    *,
    k: int = 10,
    batch: int = 64,
    seed: int = 0,
) -> RulePrices:
    """What each rule costs on the labels of `queries`.

    `catalogue` has categories and attributes of every item, `vectors (items, d)` their vectors of length 1, both in the
    order of the interactions' items. A filter keeps items out before the pool is chosen, as the database does.
    """
    variants = _variants(rules)
    allowed = {name: _allowed(one, catalogue) for name, (one, _) in variants.items()}
    bits = {name: bits_of(one.conditions, catalogue) for name, (one, _) in variants.items()}
    first, request = queries.requests()
    asked = queries.take(first)
    rank = {name: np.full(len(queries), k + 1, np.int64) for name in variants}
    shown = dict.fromkeys(variants, 0)
    labels_of = np.argsort(request, kind="stable")
    starts = np.searchsorted(request[labels_of], np.arange(len(asked) + 1))
    for begin in range(0, len(asked), batch):
        part = asked.take(slice(begin, begin + batch))
        scores, seen = scorer(part), part.seen()
        for name, (one, diversity) in variants.items():
            pool = best_items(scores, seen | ~allowed[name], POOL)
            for row in range(len(part)):
                items = pool[row][pool[row] >= 0]
                slate = choose(
                    scores[row, items],
                    k,
                    vectors=vectors[items],
                    diversity=diversity,
                    limits=one.limits(bits[name][items], k),
                ).order
                shown[name] += len(slate)
                listed = items[slate]
                for label in labels_of[starts[begin + row] : starts[begin + row + 1]]:
                    place = np.flatnonzero(listed == queries.target[label])
                    rank[name][label] = place[0] + 1 if len(place) else k + 1
    gains = {name: gain(found, k) for name, found in rank.items()}
    base = gains.pop(_NONE)
    rows = []
    for name, values in gains.items():
        lost = base - values
        paid = Gain(float(lost.mean()), *interval(lost, queries.user, seed=seed))
        rows.append(RulePrice(name, float(values.mean()), paid, shown[name] / max(len(asked), 1)))
    not_priced = ("not_again_days",) if rules.not_again_days else ()
    return RulePrices(len(queries), float(base.mean()), tuple(rows), not_priced)


def price_rules(lake: Lake, connection: psycopg.Connection[Any], artifacts_url: str, rules: Rules) -> RulePrices:
    """Prices of `rules` for the trained ranker on its held-out labels. Raises as `load_training_set` and `load_learned`."""
    split = load_training_set(lake, connection, artifacts_url).split
    chosen = np.random.default_rng(0).permutation(len(split.queries))[:PRICED_LABELS]
    split = replace(split, queries=split.queries.take(np.sort(chosen)))
    trained = load_learned(artifacts_url, TRAINED_PATH).ranker
    everything = split.queries.interactions
    with PointInTime(lake, connection) as ask:
        scorer = trained.scorer(
            Slates(ask, everything, load_categories(connection, everything)),
            rerank=min(RERANKED, len(everything.item_ids)),
            sources=_sources(split),
        )
        return price(rules, scorer, split.queries, load_catalogue(connection, everything), trained.item_vectors())


def load_catalogue(connection: psycopg.Connection[Any], interactions: Interactions) -> list[Described]:
    """Categories and attributes of each item, in the order of `interactions.item_ids`; of one that is gone, none."""
    rows = connection.execute("SELECT item_id, categories, attributes FROM items").fetchall()
    found = {item_id: (categories, attributes) for item_id, categories, attributes in rows}
    return [found.get(item_id, ([], {})) for item_id in interactions.item_ids.tolist()]


_NONE = "none"


def _variants(rules: Rules) -> dict[str, tuple[Rules, float]]:
    """Each rule by itself, all of them, and each diversity: rules and setting by name; first of all, none."""
    found: dict[str, tuple[Rules, float]] = {_NONE: (NO_RULES, 0.0)}
    found |= {f"filters.{name}": (Rules({name: one}), 0.0) for name, one in rules.filters.items()}
    found |= {group.name: (Rules({}, (group,)), 0.0) for group in rules.groups}
    if len(found) > 2:
        found["all rules"] = (rules, 0.0)
    return found | {f"diversity {setting:g}": (NO_RULES, setting) for setting in DIVERSITIES}


def _allowed(rules: Rules, catalogue: Sequence[Described]) -> NDArray[np.bool_]:
    """`(items,)`: whether all filters hold."""
    where = rules.where()
    return np.array([all(one.matches(*item) for one in where) for item in catalogue], bool)


def _sources(split: Split) -> tuple[Scorer, Scorer]:
    rows = floors(split)
    return rows["7-day popularity"], rows["co-visitation"]
