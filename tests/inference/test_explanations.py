"""Explanations and rules through the whole core: a real database, a real graph, and what happens when there is no time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from rule_cases import NOT_AGAIN_DAYS, Catalogue, serve_before, try_many
from served_world import ServedWorld, build

from inference import counterfactuals, explain, explainer
from inference.deadline import Pace
from inference.models import LoadedModels
from inference.recommend import Recommender
from inference.rules import parse_rules
from inference.runtime import LarderApplication
from inference.settings import read_settings
from inference.store import History, Store
from schemas.errors import SettingsError, Unavailable
from schemas.serving import (
    AttributeFilter,
    Because,
    Filters,
    RecommendationRequest,
    RecommendationResponse,
    SimilarRequest,
)

WISH = "a funny story about space, without war"


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedWorld]:
    name = "larder_explanations"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    head, _, options = postgres_url.partition("?")
    url = f"{head.rsplit('/', 1)[0]}/{name}" + (f"?{options}" if options else "")
    try:
        yield build(url, tmp_path_factory.mktemp("explanations"))
    finally:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def catalogue(world: ServedWorld) -> Catalogue:
    with psycopg.connect(world.url) as connection:
        made = Catalogue.read(connection)
        serve_before(connection, made, world.people)
    return made


@pytest.fixture(scope="module")
def app(world: ServedWorld, catalogue: Catalogue) -> Iterator[LarderApplication]:
    made = world.application(audit_per_mille=0)
    # What these tests ask is not logged: the log of what was shown is theirs to fill.
    made.recommender = replace(made.recommender, trials=None)
    yield made
    made.close()


def ask(app: LarderApplication | Recommender, user_id: str, **more: Any) -> RecommendationResponse:
    recommender = app.recommender if isinstance(app, LarderApplication) else app
    return recommender.recommend(RecommendationRequest(user_id=user_id, **more))


def tried(answer: RecommendationResponse) -> list[tuple[str, Because]]:
    return [(item.item_id, one) for item in answer.items for one in item.because or () if one.score_without is not None]


def test_what_is_named_is_what_the_ranker_says_without_it(app: LarderApplication, world: ServedWorld) -> None:
    answer = ask(app, world.people[0], explain=True, prompt=WISH)
    assert answer.degraded == ()
    found = tried(answer)
    assert {one.kind for _, one in found} == {"event", "wish", "features"}
    assert {one.words for _, one in found if one.kind == "wish"} == {
        WISH,
        "a funny story",
        "about space",
        "without war",
    }
    assert {one.view for _, one in found if one.kind == "features"} == {
        "user_activity",
        "item_activity",
        "user_affinity",
    }
    scores = {item.item_id: item.score for item in answer.items}
    for item_id, one in found:
        assert one.effect is not None
        assert one.score_without == pytest.approx(scores[item_id] - one.effect, abs=1e-5)
    plain = ask(app, world.people[0], prompt=WISH)
    assert [item.item_id for item in plain.items] == [item.item_id for item in answer.items]
    assert all(item.reasons is None and item.because is None for item in plain.items)


def test_the_wish_left_out_scores_as_a_request_without_one(app: LarderApplication, world: ServedWorld) -> None:
    answer = ask(app, world.people[1], explain=True, prompt=WISH)
    shown = tuple(item.item_id for item in answer.items)
    again = {item.item_id: item.score for item in ask(app, world.people[1], candidates=shown).items}
    without = {item_id: one.score_without for item_id, one in tried(answer) if one.words == WISH}
    assert len(without) == 10
    # int8 in company: as far as a batch may move a score.
    assert np.allclose([without[item] for item in shown], [again[item] for item in shown], atol=0.1)


def test_evidence_counts_are_those_of_the_table(app: LarderApplication, world: ServedWorld) -> None:
    counted = 0
    with psycopg.connect(world.url) as connection:
        for user_id in world.people[:10]:
            for item_id, one in tried(ask(app, user_id, explain=True)):
                if one.kind == "event" and one.people_both is not None:
                    row = connection.execute(
                        "SELECT people FROM co_visitation WHERE item_id = %s AND neighbour_id = %s",
                        (item_id, one.item_id),
                    ).fetchone()
                    assert row == (one.people_both,)
                    counted += 1
    assert counted


def test_at_most_sixteen_items_are_left_out_for_a_whole_slate(
    app: LarderApplication, world: ServedWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[tuple[int, ...]] = []
    rows: list[int] = []
    made, run = counterfactuals.batch, LoadedModels.run

    def watched(inputs: Any, places: Any, changes: counterfactuals.Changes, *more: Any) -> Any:
        removed.extend(tuple(events) for events in changes.removed)
        return made(inputs, places, changes, *more)

    def counted(self: LoadedModels, ranker: Any, inputs: Any, left_ms: float, pace: Pace | None = None) -> Any:
        if pace is not None:
            rows.append(len(inputs["history_mask"]))
        return run(self, ranker, inputs, left_ms, pace)

    monkeypatch.setattr(counterfactuals, "batch", watched)
    monkeypatch.setattr(LoadedModels, "run", counted)
    most = 0
    for user_id in world.people[:10]:
        removed.clear()
        rows.clear()
        ask(app, user_id, explain=True)
        most = max(most, len(removed))
        assert len(set(removed)) == len(removed), "nothing is tried twice"
        assert len(rows) <= 2, "one batch, shared by two processors at most"
        assert len(removed) < sum(rows) <= 1 + counterfactuals.MOST_REMOVALS + 3
    assert most == counterfactuals.MOST_REMOVALS


@pytest.mark.parametrize("prompt", [None, WISH])
def test_shared_by_two_processors_or_not_the_same_is_tried(
    app: LarderApplication, world: ServedWorld, monkeypatch: pytest.MonkeyPatch, prompt: str | None
) -> None:
    monkeypatch.setattr(explainer, "PROCESSORS", 2)
    for user_id in [*world.people[:5], "nobody"]:
        told = []
        for worth_sharing in (1, 10**9):
            monkeypatch.setattr(explainer, "WORTH_SHARING", worth_sharing)
            answer = ask(app, user_id, explain=True, prompt=prompt)
            assert answer.degraded == ()
            told.append(
                {
                    (item, one.kind, one.words, one.view): one.effect
                    for item, one in tried(answer)
                    if one.kind != "event"
                }
            )
        shared, alone = told
        assert shared.keys() == alone.keys()
        # int8 in other company: as far as a batch may move a score.
        assert list(shared.values()) == pytest.approx([alone[key] for key in shared], abs=0.1)


def test_without_time_plain_reasons_are_given_and_said(app: LarderApplication, world: ServedWorld) -> None:
    slow = Pace()
    slow.took(1e9)
    recommender = replace(app.recommender)
    recommender.explainer.pace = slow
    answer = ask(recommender, world.people[0], explain=True)
    assert answer.degraded == ("explanations",)
    assert all(item.reasons and item.because for item in answer.items)
    assert tried(answer) == []
    assert ask(app, world.people[0], explain=True).degraded == ()


@pytest.mark.parametrize("broken", ["model", "database"])
def test_what_breaks_while_explaining_breaks_no_answer(
    app: LarderApplication, world: ServedWorld, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    whole = LoadedModels.run

    def run(self: LoadedModels, ranker: Any, inputs: Any, left_ms: float, pace: Pace | None = None) -> Any:
        if pace is not None:
            raise Unavailable("the ranker failed")
        return whole(self, ranker, inputs, left_ms)

    def evidence(*_: Any) -> Any:
        raise Unavailable("the database did not answer in time")

    if broken == "model":
        monkeypatch.setattr(LoadedModels, "run", run)
    else:
        monkeypatch.setattr(explainer, "read_evidence", evidence)
    answer = ask(app, world.people[0], explain=True)
    assert answer.degraded == ("explanations",)
    assert [item.item_id for item in answer.items] == [item.item_id for item in ask(app, world.people[0]).items]


def test_somebody_unknown_gets_reasons_too(app: LarderApplication) -> None:
    answer = ask(app, "nobody", explain=True)
    assert answer.degraded == ()
    assert all(item.reasons for item in answer.items)
    assert all(one.kind != "event" for _, one in tried(answer))
    assert ask(app, "nobody", explain=True, candidates=()).items == ()


def test_a_negative_event_is_not_called_a_likeness() -> None:
    history = History(["a", "b"], ["A", "B"], ["hide", "rating"], [None, 2.0], np.zeros(2), [None, None])
    hidden = explain.sentence(Because(kind="event", item_id="a", title="A"), history)
    assert hidden == "“A”, which you hid, led to it"
    low = explain.sentence(Because(kind="event", item_id="b", title="B", people_both=3), history)
    assert low == "“B”, which you gave 2, led to it; 3 people had both"


# --- rules ------------------------------------------------------------------------------------------------------------


def test_random_rules_are_never_broken_by_random_requests(
    app: LarderApplication, world: ServedWorld, catalogue: Catalogue
) -> None:
    outcome = try_many(app.recommender, catalogue, world.people, 300)
    assert not outcome.broken
    assert {note.outcome for note in outcome.notes} == {"fewer", "missed"}
    assert outcome.short


@pytest.mark.prove
def test_ten_thousand_random_requests_break_no_rule(
    app: LarderApplication, world: ServedWorld, catalogue: Catalogue
) -> None:
    outcome = try_many(app.recommender, catalogue, world.people, 10_000, seed=1)
    assert (outcome.requests, outcome.broken) == (10_000, {})


def test_what_was_shown_lately_is_held_back_until_something_comes_of_it(
    app: LarderApplication, world: ServedWorld, catalogue: Catalogue
) -> None:
    with_rule = replace(app.recommender, rules=parse_rules(f"not_again_days = {NOT_AGAIN_DAYS}"))
    number, user_id, only_then = _shown_once(app, world, catalogue)
    held = catalogue.shown[user_id]
    answer = ask(with_rule, user_id, k=120)
    assert not {item.item_id for item in answer.items} & held
    assert ("not_again_days", "fewer") in {(note.rule, note.outcome) for note in answer.rules}
    # The request that showed them, made again, may show them again.
    again = {item.item_id for item in ask(with_rule, user_id, k=120, request_id=f"before-{number}-1").items}
    assert only_then <= again
    # What came of it is no longer held back.
    item = min(only_then)
    with psycopg.connect(world.url) as connection:
        connection.execute(
            "INSERT INTO user_history (user_id, occurred_at, event_id, item_id, kind) VALUES (%s, now(), 'since', %s, 'view')",
            (user_id, item),
        )
    try:
        answered = ask(with_rule, user_id, candidates=tuple(held))
        assert {one.item_id for one in answered.items} == {item}
    finally:
        with psycopg.connect(world.url) as connection:
            connection.execute("DELETE FROM user_history WHERE event_id = 'since'")


def _shown_once(app: LarderApplication, world: ServedWorld, catalogue: Catalogue) -> tuple[int, str, set[str]]:
    """Somebody, by number, whom one request alone showed something lately that they would be shown now; and that."""
    with psycopg.connect(world.url) as connection:
        for number, user_id in enumerate(world.people):
            shown = {
                age: set(row[0])
                for age in (1, 3)
                if (
                    row := connection.execute(
                        "SELECT item_ids FROM served_requests WHERE request_id = %s", (f"before-{number}-{age}",)
                    ).fetchone()
                )
            }
            free = {item.item_id for item in ask(app, user_id, k=120).items}
            if only_then := (shown[1] - shown[3]) & free:
                return number, user_id, only_then
    raise AssertionError("nobody was shown anything that they would be shown now")


def test_a_request_may_filter_by_attributes(app: LarderApplication, catalogue: Catalogue, world: ServedWorld) -> None:
    where = (AttributeFilter(attribute="length_minutes", at_least=30, at_most=90),)
    shown = [item.item_id for item in ask(app, world.people[0], k=20, filters=Filters(where=where)).items]
    near = app.similar(SimilarRequest(item_id=shown[0], filters=Filters(where=where))).items
    assert near
    for item_id in (*shown, *(item.item_id for item in near)):
        assert 30 <= catalogue.items[item_id][1]["length_minutes"] <= 90


def test_rules_hold_for_the_shipped_list(world: ServedWorld, catalogue: Catalogue, app: LarderApplication) -> None:
    """The database is gone; the list says what its items are."""
    dark = replace(app.recommender, store=Store("postgresql://127.0.0.1:1/none"))
    category = catalogue.categories[0]
    text = f'not_again_days = 3\n[quotas.a]\ncategory = "{category}"\nat_most = 1\n[filters.f]\nattribute = "length_minutes"\nat_most = 90'
    answer = ask(replace(dark, rules=parse_rules(text)), world.people[0], k=30)
    assert answer.degraded == ("database",)
    shown = [item.item_id for item in answer.items]
    assert shown
    assert sum(category in catalogue.items[item][0] for item in shown) <= 1
    assert all(catalogue.items[item][1]["length_minutes"] <= 90 for item in shown)
    assert ("not_again_days", "unchecked") in {(note.rule, note.outcome) for note in answer.rules}


def test_the_function_reads_its_rules_from_the_file_that_is_named(world: ServedWorld, tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text('[quotas.none]\ncategory = "x"\nat_most = 0')
    settings = read_settings(
        {"DATABASE_URL": world.url, "ARTIFACTS_URL": world.artifacts_url, "LARDER_RULES": str(file)}
    )
    made = LarderApplication.from_settings(settings)
    try:
        assert [group.name for group in made.recommender.rules.groups] == ["quotas.none"]
    finally:
        made.close()
    file.write_text("nothing = 1")
    with pytest.raises(SettingsError, match="no rule 'nothing'"):
        LarderApplication.from_settings(settings)
    with pytest.raises(SettingsError, match="cannot be read"):
        LarderApplication.from_settings(replace(settings, rules=str(tmp_path / "missing.toml")))


def test_mean_diversity_never_falls_as_its_setting_rises(app: LarderApplication, world: ServedWorld) -> None:
    with psycopg.connect(world.url) as connection:
        rows = connection.execute(
            "SELECT item_id, vector::text FROM item_vectors WHERE model_version = %s", (world.version,)
        ).fetchall()
    vectors = {item_id: np.array(json.loads(vector)) for item_id, vector in rows}

    def intra_list(setting: float, user_id: str) -> float:
        items = [vectors[item.item_id] for item in ask(app, user_id, diversity=setting).items]
        unit = np.stack([one / np.linalg.norm(one) for one in items])
        return float(1 - ((unit.sum(axis=0) ** 2).sum() - len(unit)) / (len(unit) * (len(unit) - 1)))

    means = [np.mean([intra_list(setting, who) for who in world.people]) for setting in (0, 0.25, 0.5, 0.75, 1)]
    assert means == sorted(means)
    assert means[-1] > means[0]
