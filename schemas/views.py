"""The feature views of this deployment. Adding a feature is one line here.

Tables, SQL, assets, column schemas and the ranker's input order follow from these declarations.
"""

from __future__ import annotations

from schemas.declarations import check_views
from schemas.events import LIKED_VALUE
from schemas.features import (
    ITEM,
    USER,
    USER_CATEGORY,
    FeatureView,
    active_days,
    count,
    decayed_count,
    feature_fingerprint,
    last_seen,
    mean_value,
    rate,
)

_LIKED = f"value >= {LIKED_VALUE}"

USER_ACTIVITY = FeatureView(
    name="user_activity",
    entity=USER,
    owner="team:recommendations",
    description="How much, how lately and how generously a person has been active.",
    ttl_days=3,
    features=(
        count("events_7d", 7),
        count("events_30d", 30),
        count("events_180d", 180),
        active_days("active_days_30d", 30),
        mean_value("value_mean_180d", 180),
        rate("liked_rate_180d", 180, where=_LIKED, state="liked"),
        last_seen("last_seen_age_seconds", 180),
    ),
)

ITEM_ACTIVITY = FeatureView(
    name="item_activity",
    entity=ITEM,
    owner="team:recommendations",
    description="How much, how lately and how well an item has been received.",
    ttl_days=3,
    features=(
        count("events_1d", 1),
        count("events_7d", 7),
        count("events_30d", 30),
        count("events_180d", 180),
        decayed_count("decayed_events_180d", 180, half_life_days=7),
        mean_value("value_mean_180d", 180),
        rate("liked_rate_180d", 180, where=_LIKED, state="liked"),
        last_seen("last_seen_age_seconds", 180),
    ),
)

USER_AFFINITY = FeatureView(
    name="user_affinity",
    entity=USER_CATEGORY,
    owner="team:recommendations",
    description="What a person does with each category: how often, how lately, how well liked.",
    ttl_days=3,
    features=(
        count("events_30d", 30),
        count("events_180d", 180),
        mean_value("value_mean_180d", 180),
        rate("liked_rate_180d", 180, where=_LIKED, state="liked"),
    ),
)

VIEWS: tuple[FeatureView, ...] = (USER_ACTIVITY, ITEM_ACTIVITY, USER_AFFINITY)
check_views(VIEWS)

CONTEXT_VIEWS: tuple[FeatureView, ...] = (USER_ACTIVITY,)
"""Views whose features describe the person: the ranker's context."""
CANDIDATE_VIEWS: tuple[FeatureView, ...] = (ITEM_ACTIVITY,)
"""Views whose features describe a candidate."""
CROSS_VIEWS: tuple[FeatureView, ...] = (USER_AFFINITY,)
"""Views keyed by person and category: a candidate gets the mean over its categories."""


def context_features() -> tuple[str, ...]:
    """The ranker's context features `view.feature`, in order."""
    return tuple(f"{view.name}.{feature.name}" for view in CONTEXT_VIEWS for feature in view.features)


def candidate_features() -> tuple[str, ...]:
    """The ranker's candidate features `view.feature`, in order: the item's own, then the crossed ones."""
    return tuple(
        f"{view.name}.{feature.name}" for view in (*CANDIDATE_VIEWS, *CROSS_VIEWS) for feature in view.features
    )


def fingerprint(views: tuple[FeatureView, ...] | None = None) -> str:
    """Changes when the order, the number or the meaning of the features of `views`, the ranker's by default, changes."""
    views = (*CONTEXT_VIEWS, *CANDIDATE_VIEWS, *CROSS_VIEWS) if views is None else views
    meaning = [
        f"{view.name}.{feature.name}:{feature.finish}:{feature.transform}:{feature.window_days}"
        for view in views
        for feature in view.features
    ]
    return feature_fingerprint([*meaning, *(view.definition_hash for view in views)])
