"""Templates are judged by what they decide, chosen on equal conditions, and their winner is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray

from orchestration.compute.interactions import Interactions
from orchestration.compute.prompt_evaluation import (
    DECIDES,
    PromptData,
    PromptFigures,
    choose,
    countable,
    judge,
    lift,
    prompt_data,
)
from orchestration.compute.prompt_records import (
    Judged,
    PromptVersions,
    judged,
    read_versions,
    record_figures,
    record_winner,
)
from schemas import prompts
from schemas.errors import DefinitionError
from schemas.events import Item
from schemas.ranker import TEXT_DIM

GENRES = ("comedy", "crime", "romance", "space")
ITEMS, PEOPLE, EVENTS = 480, 960, 14
TITLE_WORDS = 40


@cache
def word(text: str) -> NDArray[np.float32]:
    return np.random.default_rng(list(text.encode())).standard_normal(TEXT_DIM).astype(np.float32)


def by_words(texts: Sequence[str]) -> NDArray[np.float32]:
    """Texts as the sum of their words: alike where they share some."""
    rows = [
        sum((word(name) for name in text.lower().replace(".", " ").replace(",", " ").split()), word(""))
        for text in texts
    ]
    table = np.stack(rows).astype(np.float32)
    return table / np.linalg.norm(table, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def data() -> PromptData:
    """People who like two genres each, so that a wish says what a history does not; titles say nothing of it."""
    generator = np.random.default_rng(0)
    genre = np.arange(ITEMS) % len(GENRES)
    titles = generator.integers(0, TITLE_WORDS, (ITEMS, 2))
    items = [
        Item(f"i{n:03}", f"title{titles[n, 0]} title{titles[n, 1]}", "", (GENRES[genre[n]],)) for n in range(ITEMS)
    ]
    taste = np.arange(PEOPLE) % len(GENRES)
    rows = []
    for person in range(PEOPLE):
        liked = np.flatnonzero(np.isin(genre, [taste[person], (taste[person] + 1) % len(GENRES)]))
        rows.append(generator.permutation(liked)[:EVENTS])
    n = PEOPLE * EVENTS
    events = Interactions(
        np.array([f"u{number:03}" for number in range(PEOPLE)]),
        np.array([item.item_id for item in items]),
        np.repeat(np.arange(PEOPLE), EVENTS).astype(np.int32),
        np.concatenate(rows).astype(np.int32),
        np.arange(n, dtype=np.int64) * 60_000_000,
        np.ones(n, np.int64),
        np.full(n, np.nan, np.float32),
    )
    return prompt_data(events, items)


def score(data: PromptData, version: str) -> PromptFigures:
    return judge(data, version, PromptVersions(item="item.v3"), by_words, by_words)


def test_a_template_that_says_what_an_item_is_finds_it_before_anybody_had_it(data: PromptData) -> None:
    title, categories = score(data, "item.v2"), score(data, "item.v3")
    # Half the catalogue is of somebody's genres: twice what chance finds is all that categories can do, and titles find
    # what chance does.
    assert categories.cold_item_recall > 1.5 * title.cold_item_recall
    assert categories.cold_item_recall_low > title.cold_item_recall_high
    assert categories.neighbours_recall > 1.5 * title.neighbours_recall
    assert categories.genre_lift > 1.5 * title.genre_lift
    assert categories.genre_lift_with_history > title.genre_lift_with_history
    assert categories.cold_item_recall_low <= categories.cold_item_recall <= categories.cold_item_recall_high
    assert categories.categories == len(GENRES)


def test_judging_twice_gives_the_same_figures(data: PromptData) -> None:
    once, again = (replace(score(data, "wish.v1"), seconds=0.0) for _ in range(2))
    assert once == again


def test_a_wish_template_that_drowns_the_wish_moves_the_list_less(data: PromptData) -> None:
    clear, drowned = score(data, "wish.v1"), score(data, "wish.v2")
    # Where nothing but the wish is known both reach 4, all that four genres allow; a history of two genres pulls away from it.
    assert clear.genre_lift >= drowned.genre_lift
    assert clear.genre_lift_with_history > drowned.genre_lift_with_history


def test_hidden_items_differ_from_fold_to_fold_and_are_seen_items(data: PromptData) -> None:
    assert data.hidden.sum(0).max() == 1
    assert (data.hidden.sum(1) == ITEMS // 10).all()


def test_too_few_events_to_judge_a_template_says_how_many_are_needed(data: PromptData) -> None:
    few = data.events.take(np.arange(40))
    with pytest.raises(DefinitionError, match=r"too few to judge a template by: 100 are needed, about 250 events"):
        prompt_data(few, data.items)


def test_lift_is_share_over_share_and_no_rare_category_rules() -> None:
    member = np.zeros((40, 3), bool)
    member[:10, 0] = True
    member[:, 1] = True
    member[0, 2] = True
    best_first = -np.arange(40, dtype=np.float32)[None]
    assert lift(best_first, np.array([0]), member) == 2.0
    assert lift(best_first, np.array([1]), member) == 1.0
    assert lift(best_first.repeat(2, 0), np.array([1, 2]), member) == pytest.approx(1.05 / 1.025)
    assert lift(best_first[:0], np.array([], int), member) == 0
    assert countable(member).tolist() == [1]  # ten items cannot fill a list of twenty


def rows(kind: str, **figures: dict[str, Any]) -> list[Judged]:
    base = {"warm_recall": 0.3, "warm_recall_low": 0.28}
    for name in DECIDES.values():
        base |= {name: 2.0, f"{name}_folds": [1.0, 3.0]}
    return [
        Judged(number, version, base | figures.get(version.replace(".", "_"), {}))
        for number, version in enumerate(prompts.versions(kind))
    ]


def chosen(found: list[Judged], kind: str, current: str) -> str:
    best = choose(found, kind, current)
    assert best is not None
    return best.version


def test_nothing_is_chosen_until_every_template_of_the_kind_is_judged() -> None:
    assert choose(rows("item")[:-1], "item", "item.v1") is None


@pytest.mark.parametrize("kind", sorted(DECIDES))
def test_the_best_wins_and_of_equals_the_one_in_use_stays(kind: str) -> None:
    decides = DECIDES[kind]
    assert chosen(rows(kind), kind, f"{kind}.v2") == f"{kind}.v2"
    found = rows(
        kind,
        **{
            f"{kind}_v1": {decides: 4.0, f"{decides}_folds": [3.0, 5.0]},
            f"{kind}_v3": {decides: 5.0, f"{decides}_folds": [4.0, 6.0]},
        },
    )
    assert chosen(found, kind, f"{kind}.v2") == f"{kind}.v3"
    assert chosen(found, kind, f"{kind}.v99") == f"{kind}.v3"


def test_one_that_is_better_in_some_folds_only_does_not_win() -> None:
    found = rows("wish", wish_v3={"genre_lift": 2.1, "genre_lift_folds": [1.3, 2.9]})
    assert chosen(found, "wish", "wish.v1") == "wish.v1"


def test_a_wish_that_makes_lists_without_one_worse_does_not_win() -> None:
    better = {"genre_lift": 9.0, "genre_lift_folds": [8.0, 10.0]}
    assert chosen(rows("wish", wish_v2=better), "wish", "wish.v1") == "wish.v2"
    assert chosen(rows("wish", wish_v2=better | {"warm_recall": 0.2}), "wish", "wish.v1") == "wish.v1"


def test_the_default_holds_until_a_winner_is_recorded(connection: psycopg.Connection) -> None:
    assert read_versions(connection) == PromptVersions()
    figures = dict.fromkeys(("cold_item_recall", "genre_lift"), 1.0)
    for version in prompts.versions("item"):
        record_figures(connection, version, "here", figures)
    record_figures(connection, "item.v2", "elsewhere", figures)
    second = record_figures(connection, "item.v2", "here", figures | {"cold_item_recall": 2.0})
    found = judged(connection, "item", "here")
    assert [row.version for row in found] == list(prompts.versions("item"))
    assert found[1] == Judged(second, "item.v2", figures | {"cold_item_recall": 2.0})
    assert record_winner(connection, found[1])
    assert not record_winner(connection, found[1])
    assert asdict(read_versions(connection)) == asdict(PromptVersions()) | {"item": "item.v2"}


def test_a_winner_whose_file_is_gone_is_named(connection: psycopg.Connection) -> None:
    number = record_figures(connection, "item.v2", "here", {})
    connection.execute(
        "INSERT INTO prompt_winners (kind, version, evaluation_id) VALUES ('item', 'item.v99', %s)", (number,)
    )
    with pytest.raises(DefinitionError, match=r"no prompt template 'item\.v99'"):
        read_versions(connection)


def test_figures_are_compared_only_where_all_else_is_equal(data: PromptData) -> None:
    base = PromptVersions()
    here = data.conditions("item", base, "encoder")
    assert data.conditions("item", replace(base, item="item.v2"), "encoder") == here
    others = {
        data.conditions("item", replace(base, wish="wish.v2"), "encoder"),
        data.conditions("item", base, "another encoder"),
        replace(data, items=[replace(data.items[0], title="other"), *data.items[1:]]).conditions(
            "item", base, "encoder"
        ),
        replace(data, events=data.events.take(np.arange(100))).conditions("item", base, "encoder"),
    }
    assert len(others | {here}) == 5
