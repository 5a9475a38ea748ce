"""Rules: what the file may say, what it costs to say it wrong, and that the database and this code mean the same by it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import psycopg
import pytest

from inference.candidates import Filters
from inference.predicates import Condition, all_sql
from inference.rerank import Chosen, choose
from inference.rules import Group, bits_of, parse_rules
from schemas.errors import SettingsError
from schemas.serving import AttributeFilter

WHOLE = """
not_again_days = 7

[filters.recent]
attribute = "year"
at_least = 1990

[quotas.horror]
category = "horror"
at_most = 2

[exposure.independent]
attribute = "publisher"
one_of = ["us", "them"]
cap = 0.3
floor = 0.1
"""


def test_a_whole_file_is_read() -> None:
    rules = parse_rules(WHOLE)
    assert rules.not_again_days == 7
    assert rules.where() == (Condition("year", at_least=1990),)
    assert [group.name for group in rules.groups] == ["quotas.horror", "exposure.independent"]
    assert [(group.slots_least(10), group.slots_most(10)) for group in rules.groups] == [(0, 2), (1, 3)]


def test_shares_are_rounded_so_that_no_cap_is_passed_and_no_floor_forgotten() -> None:
    group = Group("exposure.g", Condition(category="g"), 0.3, 0.25, share=True)
    assert [(group.slots_least(k), group.slots_most(k)) for k in (1, 3, 4, 10)] == [(0, 0), (0, 0), (1, 1), (3, 3)]


def test_every_fault_is_told_at_once() -> None:
    broken = """
not_again_days = -1
colour = "red"

[filters.a]
attribute = "year"
above = 3

[filters.b]
category = "x"
attribute = "y"

[quotas.c]
category = "horror"
at_least = 3
at_most = 2

[exposure.d]
category = "x"
cap = 3
"""
    with pytest.raises(SettingsError) as raised:
        parse_rules(broken)
    message = str(raised.value)
    for part in (
        "not_again_days is -1",
        "no rule 'colour'",
        "filters.a has no 'above'",
        "filters.b gives both",
        "quotas.c wants at least 3",
        "exposure.d.cap is 3",
    ):
        assert part in message


@pytest.mark.parametrize(
    "text",
    [
        "filters = 3",
        "[filters]\na = 3",
        '[filters."; DROP TABLE items"]\nattribute = "a"\nat_least = 1',
        '[filters.a]\nattribute = ""\nat_least = 1',
        '[filters.a]\nattribute = "a"\nat_least = nan',
        '[filters.a]\nattribute = "a"\none_of = []',
        '[filters.a]\nattribute = "a"\nat_least = 2\nat_most = 1',
        "[quotas.a]\nattribute = 'a'\nat_most = 1",
        "[quotas.a]\ncategory = 'a'",
        "[exposure.a]\ncategory = 'a'\ncap = true",
        "not_again_days = true",
        "not toml",
    ],
)
def test_a_file_that_says_something_else_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        parse_rules(text)


CATALOGUE: list[tuple[list[str], dict[str, Any]]] = [
    (["a"], {"year": 1990, "publisher": "us"}),
    (["a", "b"], {"year": "1990", "publisher": "o'them"}),
    (["b"], {"year": 1989.5, "publisher": None}),
    ([], {"year": "about 1990", "publisher": 3}),
    (["a"], {"year": "1990\n", "publisher": "3"}),
    (["c"], {"year": True, "publisher": ["us"]}),
    (["b"], {"year": -5, "publisher": "'; DROP TABLE items; --"}),
    (["b"], {"year": 1e-7, "publisher": 3.0}),
    (["b"], {}),
]
CONDITIONS = [
    Condition(category="a"),
    Condition(category="'"),
    Condition("year", at_least=1990),
    Condition("year", at_most=1990),
    Condition("year", at_least=0, at_most=1989.5, missing=True),
    Condition("year", one_of=(1990.0,)),
    Condition("publisher", one_of=("us", "'; DROP TABLE items; --")),
    Condition("publisher", one_of=("3", 7.0)),
    Condition("publisher", one_of=(3.0,)),
    Condition("publisher", none_of=("us", 3.0)),
    Condition("publisher", none_of=("us",), missing=True),
    Condition("publisher"),
    Condition("no such thing", one_of=("x",)),
    Condition("no' OR true --", missing=True),
]


@pytest.fixture
def catalogue(connection: psycopg.Connection) -> psycopg.Connection:
    connection.cursor().executemany(
        "INSERT INTO items (item_id, title, categories, attributes) VALUES (%s, 't', %s, %s)",
        [(f"i{n}", categories, json.dumps(attributes)) for n, (categories, attributes) in enumerate(CATALOGUE)],
    )
    return connection


@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
def test_the_database_and_this_code_mean_the_same(catalogue: psycopg.Connection, condition: Condition) -> None:
    sql, parameters = all_sql([condition], "i", "c")
    found = catalogue.execute(f"SELECT i.item_id FROM items AS i WHERE {sql} ORDER BY 1", parameters).fetchall()
    ours = [f"i{n}" for n, item in enumerate(CATALOGUE) if condition.matches(*item)]
    assert [row[0] for row in found] == ours


def test_group_bits_come_out_of_the_database_as_out_of_this_code(catalogue: psycopg.Connection) -> None:
    filters = Filters(groups=CONDITIONS)
    parameters = {name: value for name, value in filters.parameters().items() if name.startswith("group_")}
    rows = catalogue.execute(
        f"SELECT {filters.group_bits('i')} FROM items AS i ORDER BY item_id", parameters
    ).fetchall()
    assert [row[0] for row in rows] == bits_of(CONDITIONS, CATALOGUE).tolist()


def test_a_requests_filter_only_tightens() -> None:
    rules = parse_rules(WHOLE)
    where = rules.where([AttributeFilter(attribute="year", at_least=1980)])
    item = (["x"], {"year": 1985})
    assert len(where) == 2
    assert where[1].matches(*item)
    assert not all(one.matches(*item) for one in where)


def test_notes_name_the_rule_that_left_the_slate_short() -> None:
    rules = parse_rules(WHOLE)
    chosen = Chosen(np.arange(4), blocking=[0], missed={1: 1})
    notes = [(one.rule, one.outcome, one.slots) for one in rules.notes(chosen, 10, held_back=3)]
    assert notes == [
        ("quotas.horror", "fewer", 6),
        ("filters.recent", "fewer", 6),
        ("not_again_days", "fewer", 6),
        ("exposure.independent", "missed", 1),
    ]
    unread = rules.notes(Chosen(np.arange(10)), 10, held_back=None)
    assert [(one.rule, one.outcome) for one in unread] == [("not_again_days", "unchecked")]
    assert rules.notes(Chosen(np.arange(10)), 10, held_back=3) == ()


def test_a_quota_leaves_the_slate_short_rather_than_being_broken() -> None:
    rules = parse_rules('[quotas.a]\ncategory = "a"\nat_most = 2')
    bits = np.array([1, 1, 1, 0, 1], np.int64)
    chosen = choose(np.arange(5, 0, -1).astype(np.float32), 4, limits=rules.limits(bits, 4))
    assert chosen.order.tolist() == [0, 1, 3]
    assert chosen.blocking == [0]


def test_a_floor_takes_the_last_slots_and_no_more_than_there_are() -> None:
    rules = parse_rules('[exposure.a]\ncategory = "a"\nfloor = 0.5')
    scores = np.arange(6, 0, -1).astype(np.float32)
    met = choose(scores, 4, limits=rules.limits(np.array([0, 0, 0, 0, 1, 1], np.int64), 4))
    assert (met.order.tolist(), met.missed) == ([0, 1, 4, 5], {})
    short = choose(scores, 4, limits=rules.limits(np.array([0, 0, 0, 0, 0, 1], np.int64), 4))
    assert (short.order.tolist(), short.missed) == ([0, 1, 2, 5], {0: 1})


def test_without_limits_and_diversity_a_slate_is_the_best_by_score() -> None:
    scores = np.array([1, 3, 3, 2], np.float32)
    assert choose(scores, 3).order.tolist() == [1, 2, 3]
    none = parse_rules("").limits(np.zeros(4, np.int64), 3)
    assert none is None
