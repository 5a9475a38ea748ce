"""Declarations: what they refuse, and what a change of meaning changes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schemas import views
from schemas.errors import DefinitionError
from schemas.features import ITEM, FeatureView, count, decayed_count, mean_value
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


def test_features_over_the_same_states_share_columns() -> None:
    columns = [name for name, _, _ in view(count("n", 7), mean_value("m", 7), mean_value("m2", 30)).columns]
    assert columns == ["n_7d", "value_sum_7d", "value_n_7d", "value_sum_30d", "value_n_30d"]


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
