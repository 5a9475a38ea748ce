"""Declarations: what they refuse, and what a change of meaning changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from schemas import views
from schemas.declarations import check_views
from schemas.errors import DefinitionError
from schemas.features import ITEM, Entity, FeatureView, count, decayed_count, mean_value, rate
from schemas.tables import view_table


def view(*features: object, **changes: object) -> FeatureView:
    given = {"name": "v", "entity": ITEM, "owner": "team:x", "description": "", "ttl_days": 1, "features": features}
    return FeatureView(**(given | changes))  # type: ignore[arg-type]


def test_a_window_of_zero_is_refused_naming_view_and_feature() -> None:
    with pytest.raises(DefinitionError, match=r"'n_0' of view 'v' has a window of 0 days"):
        view(count("n_0", 0))


def test_two_features_of_one_name_are_refused() -> None:
    with pytest.raises(DefinitionError, match="two features named 'n'"):
        view(count("n", 1), count("n", 2))


def test_a_half_life_of_zero_is_refused() -> None:
    with pytest.raises(DefinitionError, match="half life of 0"):
        decayed_count("n", 7, half_life_days=0)


LIKED = {"where": "value > 3", "state": "liked"}


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: view(count("n", 7.5)), r"feature 'n' of view 'v' has a window of 7\.5 days.*whole number.*1 to 3650"),
        (
            lambda: view(count("n", 7), ttl_days=0),
            r"view 'v' has a ttl of 0 days, shorter than the head.*\(n\).*1 or more",
        ),
        (lambda: view(count("n", 7), owner="me"), r"view 'v' has the owner 'me'; say team:"),
        (lambda: view(count("N", 7)), r"feature 'N' of view 'v' cannot be a column.*rename"),
        (
            lambda: view(count("n", 7), entity=Entity("e", ("user",))),
            r"view 'v': entity 'e' has the key column 'user', which events do not have \(did you mean user_id\?\)",
        ),
        (
            lambda: view(count("n", 7), entity=Entity("e", ("user_id", "value"))),
            r"view 'v': entity 'e' has the key column 'value', which is a number; keys are text: user_id",
        ),
        (
            lambda: view(count("n", 7), entity=Entity("e", ("kind",))),
            r"'v'.*key column 'kind'; keys are some of user_id",
        ),
        (lambda: view(count("n", 7), entity=Entity("e", ("category",))), r"'v'.*keyed by category; give it user_id or"),
        (lambda: view(count("n", 7), entity=Entity("e", ("user_id",) * 2)), r"'v'.*a key column twice"),
        (
            lambda: view(count("n", 7), count("m", 7, where="value > 3", state="n")),
            r"feature 'm' of view 'v' defines state 'n' as .*value > 3.*feature 'n' of view 'v' as COUNT.*state=\"m\"",
        ),
        *(
            (
                lambda where=where: view(count("n", 7), count("m", 7, where=where)),
                r"feature 'm' of view 'v' counts by .*query",
            )
            for where in (
                "(select max(value) from events) > 3",
                "value IN ( VALUES (1))",
                "exists(FROM events)",
                "value > (/* */ SELECT 3)",
                "value > 3; DROP TABLE items",
            )
        ),
        (
            lambda: view(rate("m", 7, where="value = (SELECT 3)", state="three")),
            r"feature 'm' of view 'v' counts by 'value = \(SELECT 3\)', which holds a query.*item_id, kind, value",
        ),
        (
            lambda: view(count("n", 7, **LIKED), rate("m", 7, where="value > 4", state="liked")),
            r"feature 'm' of view 'v' defines state 'liked'",
        ),
        (
            lambda: view(count("n", 7, where="value > 3", state="day")),
            r"'n' of view 'v' has a state named 'day'.*rename",
        ),
        (lambda: view(count("n", 7, where="value > 3", state="liked_at")), r"'n' of view 'v'.*'liked_at'.*end in _at"),
        (lambda: view(count("n", 7, where="value > 3", state="a b")), r"'n' of view 'v' has a state named 'a b'"),
        (
            lambda: view(mean_value("m", 7, low=5, high=1)),
            r"'m' of view 'v' lies between 5 and 1; turn the limits round",
        ),
        (lambda: rate("m", 7, of="rows", **LIKED), r"'m' is a rate of 'rows'; say of='value' or of='events'"),
        (lambda: check_views([view(count("n", 7)), view(count("n", 8))]), r"two views named 'v'; rename one"),
        (
            lambda: check_views(
                [view(count("n", 7)), view(count("n", 8), name="w", entity=Entity("item", ("user_id",)))]
            ),
            r"view 'w' is keyed by user_id and view 'v' by item_id, both under the entity name 'item'",
        ),
    ],
)
def test_a_declaration_that_cannot_work_is_refused_with_the_way_out(
    declare: Callable[[], object], message: str
) -> None:
    with pytest.raises(DefinitionError, match=message):
        declare()


def test_a_condition_of_alternatives_stays_one_condition_beside_others() -> None:
    (state,) = count("n", 7, where="kind = 'view' OR kind = 'like'", state="shown").states
    assert state.sql_over("value > 3") == "COUNT(*) FILTER (WHERE value > 3 AND (kind = 'view' OR kind = 'like'))"


def test_a_count_with_a_condition_names_its_own_state() -> None:
    features = [count("a", 7, where="value > 3"), count("b", 7, where="value < 3"), count("c", 30, where="value > 3")]
    names = view(count("n", 7), *features).columns
    assert len({state.name for _, state, _ in names}) == 3
    assert features[0].states == features[2].states
    assert features[0].states[0].name.startswith("n_value_3_")
    long = "kind = 'a (select' OR kind IN ('B', 'c') OR EXTRACT(EPOCH FROM occurred_at) > 3" * 3
    view(count("n", 7, where=long))


def test_features_over_the_same_states_share_columns() -> None:
    columns = [name for name, _, _ in view(count("n", 7), mean_value("m", 7), mean_value("m2", 30)).columns]
    assert columns == ["n_7d", "value_sum_7d", "value_n_7d", "value_sum_30d", "value_n_30d"]


def test_views_of_one_name_are_one_key_only_if_all_of_them_is_the_same() -> None:
    other = replace(views.USER_ACTIVITY, ttl_days=views.USER_ACTIVITY.ttl_days + 1)
    held = {views.USER_ACTIVITY: "as declared", other: "another"}
    assert held[replace(views.USER_ACTIVITY)] == "as declared"
    assert held[other] == "another"


def test_the_fingerprint_changes_with_order_and_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    before = views.fingerprint()
    turned = replace(views.ITEM_ACTIVITY, features=views.ITEM_ACTIVITY.features[::-1])
    monkeypatch.setattr(views, "CANDIDATE_VIEWS", (turned,))
    assert views.fingerprint() != before


def test_a_new_feature_reaches_table_hash_and_ranker_input(monkeypatch: pytest.MonkeyPatch) -> None:
    more = replace(views.ITEM_ACTIVITY, features=(*views.ITEM_ACTIVITY.features, count("events_14d", 14)))
    monkeypatch.setattr(views, "CANDIDATE_VIEWS", (more,))
    assert "n_14d" in view_table(more).columns
    assert more.definition_hash != views.ITEM_ACTIVITY.definition_hash
    assert "item_activity.events_14d" in views.candidate_features()
