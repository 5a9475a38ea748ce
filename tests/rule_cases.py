"""Random rules and random requests, and what must hold of every answer: judged from the catalogue, not by the code that serves."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import psycopg

from inference.recommend import Recommender
from inference.rules import Rules, parse_rules
from schemas.serving import RecommendationRequest, RecommendationResponse, RuleNote

PROMPTS = ("a funny story", "something about space, without war", "quiet and sad")
NOT_AGAIN_DAYS = 5

_SERVED_REQUESTS = """
CREATE TABLE IF NOT EXISTS served_requests (
    request_id text PRIMARY KEY, user_id text NOT NULL, served_at timestamptz NOT NULL, wish_hash text, experiment text,
    arm text, arm_share real, model_version text NOT NULL, prompt_version text, item_ids text[] NOT NULL,
    scores real[] NOT NULL, propensities real[], candidate_ids text[], candidate_scores real[],
    candidates integer NOT NULL, sources jsonb NOT NULL, degraded text[] NOT NULL
)
"""


@dataclass
class Catalogue:
    """What the database says of items, and who had and was shown what."""

    items: dict[str, tuple[set[str], dict[str, Any]]]
    had: dict[str, set[str]]
    shown: dict[str, set[str]] = field(default_factory=dict)
    """Lately, and nothing came of it."""
    first_shown: dict[str, dict[str, datetime]] = field(default_factory=dict)

    @property
    def categories(self) -> list[str]:
        return sorted({name for categories, _ in self.items.values() for name in categories})

    @classmethod
    def read(cls, connection: psycopg.Connection[Any]) -> Catalogue:
        items = {
            item_id: (set(categories), attributes)
            for item_id, categories, attributes in connection.execute(
                "SELECT item_id, categories, attributes FROM items"
            )
        }
        had: dict[str, set[str]] = {}
        for user_id, item_id in connection.execute("SELECT user_id, item_id FROM user_history"):
            had.setdefault(user_id, set()).add(item_id)
        return cls(items, had)


def serve_before(connection: psycopg.Connection[Any], catalogue: Catalogue, people: list[str], seed: int = 0) -> None:
    """A log of what people were shown: some lately, which must be held back, some too long ago, which must not."""
    rng = np.random.default_rng(seed)
    now = datetime.now(UTC)
    connection.execute(_SERVED_REQUESTS)
    connection.execute("GRANT SELECT ON served_requests TO larder_function")
    names = sorted(catalogue.items)
    for number, person in enumerate(people):
        for age, lately in ((1, True), (3, True), (NOT_AGAIN_DAYS + 2, False)):
            shown = rng.choice(names, 8, replace=False).tolist()
            if lately:
                since = now - timedelta(days=age)
                first = catalogue.first_shown.setdefault(person, {})
                first.update({item: min(since, first.get(item, since)) for item in shown})
            connection.execute(
                "INSERT INTO served_requests (request_id, user_id, served_at, model_version, item_ids, scores, candidates, "
                "sources, degraded) VALUES (%s, %s, %s, 'm', %s, %s, 8, '{}', '{}')",
                (f"before-{number}-{age}", person, now - timedelta(days=age), shown, [0.0] * 8),
            )
    connection.commit()
    # What came of it frees an item; such an event shows only where a caller names the item, else the person had it.
    for user_id, item_id, at in connection.execute("SELECT user_id, item_id, occurred_at FROM user_history").fetchall():
        first = catalogue.first_shown.get(user_id, {})
        if item_id in first and at >= first[item_id]:
            del first[item_id]
    catalogue.shown = {person: set(first) for person, first in catalogue.first_shown.items()}


def random_rules(rng: np.random.Generator, categories: list[str]) -> tuple[str, Rules]:
    """Some rules, as the text of a file and as read from it."""
    lines = [f"not_again_days = {NOT_AGAIN_DAYS}"] if rng.random() < 0.5 else []
    kinds = ("film", "series", "book", "article", "podcast")
    if rng.random() < 0.5:
        low = int(rng.integers(5, 80))
        lines += ["[filters.length]", 'attribute = "length_minutes"', f"at_least = {low}"]
        lines += [f"at_most = {low + int(rng.integers(5, 120))}"] if rng.random() < 0.5 else []
    if rng.random() < 0.3:
        lines += ["[filters.format]", 'attribute = "format"', f'none_of = ["{rng.choice(kinds)}"]', "missing = true"]
    for number in range(int(rng.integers(0, 4))):
        most = int(rng.integers(0, 6))
        lines += [f"[quotas.q{number}]", f'category = "{rng.choice(categories)}"', f"at_most = {most}"]
        lines += [f"at_least = {int(rng.integers(0, most + 1))}"]
    for number in range(int(rng.integers(0, 3))):
        cap = round(float(rng.random()), 2)
        lines += [f"[exposure.e{number}]", f"cap = {cap}", f"floor = {round(cap * float(rng.random()), 2)}"]
        if rng.random() < 0.5:
            lines += ['attribute = "length_minutes"', f"at_most = {int(rng.integers(10, 120))}"]
        else:
            lines += [f'category = "{rng.choice(categories)}"']
    text = "\n".join(lines)
    return text, parse_rules(text)


def random_request(rng: np.random.Generator, people: list[str], catalogue: Catalogue) -> RecommendationRequest:
    """A request such as a caller may send."""
    names = sorted(catalogue.items)
    fields: dict[str, Any] = {"user_id": str(rng.choice([*people, "nobody"])), "k": int(rng.integers(1, 40))}
    if rng.random() < 0.3:
        fields["diversity"] = float(rng.random())
    if rng.random() < 0.2:
        fields["prompt"] = str(rng.choice(PROMPTS))
    if rng.random() < 0.2:
        fields["exclude"] = tuple(rng.choice(names, 10, replace=False).tolist())
    if rng.random() < 0.2:
        fields["candidates"] = tuple(rng.choice(names, 30, replace=False).tolist())
    if rng.random() < 0.2:
        fields["filters"] = {"where": ({"attribute": "length_minutes", "at_most": float(rng.integers(20, 200))},)}
    elif rng.random() < 0.2:
        fields["filters"] = {"exclude_categories": (str(rng.choice(catalogue.categories)),)}
    return RecommendationRequest.model_validate(fields)


def broken_rules(
    text: str, request: RecommendationRequest, answer: RecommendationResponse, catalogue: Catalogue
) -> list[str]:
    """Every hard rule in `text`, and of the request's own filters, that `answer` breaks."""
    shown = [item.item_id for item in answer.items]
    faults = []
    if len(shown) > request.k or len(set(shown)) != len(shown):
        faults.append("k")
    if set(shown) & set(request.exclude):
        faults.append("exclude")
    if request.candidates is None and set(shown) & catalogue.had.get(request.user_id, set()):
        faults.append("had")
    if request.candidates is not None and not set(shown) <= set(request.candidates):
        faults.append("candidates")
    for asked in request.filters.where:
        if any(_number(catalogue, item, asked.attribute) > (asked.at_most or math.inf) for item in shown):
            faults.append("request.where")
    if any(catalogue.items[item][0] & set(request.filters.exclude_categories) for item in shown):
        faults.append("request.exclude_categories")
    for name, rule in _tables(text):
        counted = [item for item in shown if _belongs(rule, item, catalogue)]
        broken = {
            "not_again_days": bool(set(shown) & catalogue.shown.get(request.user_id, set())),
            "filters": len(counted) < len(shown),
            "quotas": len(counted) > rule.get("at_most", math.inf),
            "exposure": len(counted) > rule.get("cap", 1) * request.k + 1e-9,
        }
        if broken[name.partition(".")[0]]:
            faults.append(name)
    return faults


def _tables(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rules in the text of a file, read by another parser than ours: lines such as these cases have."""
    name, table = "", dict[str, Any]()
    for line in [*text.split("\n"), "[end]"]:
        if match := re.match(r"\[(.+)\]$", line):
            if name:
                yield name, table
            name, table = match[1], {}
        elif line.startswith("not_again_days"):
            yield "not_again_days", {}
        elif " = " in line:
            key, value = line.split(" = ")
            table[key] = (
                value.strip('["]') if '"' in value else value == "true" or float(value if value != "true" else 1)
            )


def _belongs(rule: dict[str, Any], item: str, catalogue: Catalogue) -> bool:
    categories, attributes = catalogue.items[item]
    if "category" in rule:
        return bool(rule["category"] in categories)
    if rule.get("attribute") == "format":
        return bool(attributes.get("format") != rule["none_of"])
    if "attribute" not in rule:
        return True
    number = _number(catalogue, item, rule["attribute"])
    return bool(rule.get("at_least", -math.inf) <= number <= rule.get("at_most", math.inf))


def _number(catalogue: Catalogue, item: str, attribute: str) -> float:
    return float(catalogue.items[item][1].get(attribute, math.nan))


@dataclass
class Outcome:
    """What many random requests showed."""

    requests: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    short: int = 0
    notes: list[RuleNote] = field(default_factory=list)


def try_many(
    recommender: Recommender, catalogue: Catalogue, people: list[str], count: int, *, seed: int = 0, per_rules: int = 10
) -> Outcome:
    """`count` random requests, new random rules for every `per_rules` of them."""
    rng = np.random.default_rng(seed)
    outcome = Outcome()
    text, current = "", recommender
    for number in range(count):
        if number % per_rules == 0:
            text, rules = random_rules(rng, catalogue.categories)
            current = replace(recommender, rules=rules)
        request = random_request(rng, people, catalogue)
        answer = current.recommend(request)
        assert not set(answer.degraded) & {"database", "ranker"}, answer.degraded
        outcome.requests += 1
        outcome.broken.update(broken_rules(text, request, answer, catalogue))
        outcome.short += len(answer.items) < request.k
        outcome.notes += answer.rules
    return outcome
