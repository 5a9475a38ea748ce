"""Where personal data lies, why, and for how long: one declaration for the data map, for retention and for exports.

A table with a column `user_id` or `event_id` must have a place here (a test holds it to that), and what retention deletes
is what `Expiry` says. docs/data-map.md is written from it by `make data-map`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from schemas import online_sql
from schemas.features import FeatureView
from schemas.functions import SERVED_KEPT_DAYS, SERVED_REQUESTS_KEPT_DAYS
from schemas.ranker import MAX_HISTORY
from schemas.views import VIEWS

HISTORY_DAYS = 1_095
"""Three years: longer than any taste that a model learns from, and a bound for people who never come back."""
QUARANTINE_DAYS = 90
"""A quarter: long enough to mend a source and load it again."""
EXPORT_DAYS = 7
"""A week to fetch a copy of everything, which is better not left lying about."""
RECENT_DAYS = 14
"""Days of events kept in `recent_events`: enough for heads when a few partitions are late."""
SCORES_DAYS = 30
"""Lists scored ahead are fallen back on for two days by default; who left no trace since has none kept for them."""
SURVEY_DAYS = 365
"""A year of answers tells satisfaction apart by season."""
DAMAGED_SOURCE = "lake"
"""The source of quarantined rows that stand for a damaged file of the lake: they name nobody and loading needs them."""


@dataclass(frozen=True, slots=True)
class Expiry:
    """Rows of a table end `days` after the instant in `column`; only those of which `only`, a condition in SQL, holds."""

    column: str
    days: int
    only: str = "true"


@dataclass(frozen=True, slots=True)
class Place:
    """One place with personal data. `table` is `schema.table`, or empty for files and what else is no table of ours.

    `kept` says until when in words; `expiry` is what the job `retention` deletes by, None where something else ends the
    rows, which `kept` then names.
    """

    name: str
    what: str
    why: str
    kept: str
    table: str = ""
    expiry: Expiry | None = None
    readers: str = ""
    """Who may read it, where no SQL role decides that."""


def places(views: Iterable[FeatureView] = VIEWS) -> tuple[Place, ...]:
    """Every place, tables first."""
    return (*_TABLES, *_view_places(tuple(views)), *_FILES)


def _view_places(views: tuple[FeatureView, ...]) -> list[Place]:
    """The tables that the declared views of people have."""
    found = [
        Place(
            f"features of people: {view.name}",
            f"{view.description[:1].lower()}{view.description[1:].rstrip('.')}, a row per day and {view.entity.name}",
            "what the ranker knows of a person, as it was on each day: training must see the past as it was",
            "as long as the events in the lake that it is computed from, and goes with them",
            f"features.{view.name}",
        )
        for view in views
        if "user_id" in view.entity.keys
    ]
    for entity in online_sql.entities(views):
        if "user_id" in entity.keys:
            found += [
                Place(
                    f"newest features: {entity.name}",
                    "the newest day's features of each person, packed",
                    "a request reads one row instead of many",
                    "replaced by each day's build; a person's row goes with their features",
                    online_sql.rows_table(entity),
                ),
                Place(
                    f"days since the newest features: {entity.name}",
                    "what each person did on each of the last days, as counts",
                    "a request sees what happened a moment ago",
                    f"{online_sql.KEPT_DAYS} days, trimmed by each load",
                    online_sql.tiles_table(entity),
                ),
            ]
    return found


_TABLES = (
    Place(
        "profiles",
        "what the source tells of a person besides events",
        "given with the source; no request reads it",
        "as long as the source holds it; a load brings it up to date",
        "public.people",
    ),
    Place(
        "recent events",
        "who did what with which item, when, and after which recommendation",
        "features that are fresh to the second, and the way into the lake",
        f"{RECENT_DAYS + 1} days, a partition a day is dropped once the lake has it",
        "public.recent_events",
    ),
    Place(
        "history",
        f"each person's last {MAX_HISTORY} events",
        "what the ranker reads of a person to answer them",
        f"{HISTORY_DAYS} days, and never more than {MAX_HISTORY} events",
        "public.user_history",
        Expiry("occurred_at", HISTORY_DAYS),
    ),
    Place(
        "ids of events",
        "ids and instants of all events; an id that a sender made may tell of a person",
        "a repeated event changes nothing",
        "as long as the events in the lake",
        "public.event_keys",
    ),
    Place(
        "quarantine",
        "rows of a source that could not be stored, as they came, cut to 500 characters",
        "so that the source can be mended",
        f"{QUARANTINE_DAYS} days",
        "public.quarantine",
        Expiry("seen_at", QUARANTINE_DAYS, f"source <> '{DAMAGED_SOURCE}'"),
    ),
    Place(
        "features as served",
        "the feature vectors that were read for a sample of people",
        "the skew audit: were people served what the model was trained on; and the drift report",
        f"{SERVED_KEPT_DAYS} days",
        "public.served_features",
        Expiry("read_at", SERVED_KEPT_DAYS),
    ),
    Place(
        "answers",
        "what was shown to whom, by which model and in which arm of an experiment; of a wish a keyed hash",
        "experiments, drift and fairness reports, learning from what was shown and passed over",
        f"{SERVED_REQUESTS_KEPT_DAYS} days",
        "public.served_requests",
        Expiry("served_at", SERVED_REQUESTS_KEPT_DAYS),
    ),
    Place(
        "answers of shadows",
        "what an arm that nobody is shown would have answered to whom",
        "to judge a model before anybody sees it",
        f"{SERVED_REQUESTS_KEPT_DAYS} days",
        "public.shadow_requests",
        Expiry("served_at", SERVED_REQUESTS_KEPT_DAYS),
    ),
    Place(
        "lists scored ahead",
        "each person's list, chosen by the model some time before it is asked for",
        "an answer for them when no model can rank",
        f"{SCORES_DAYS} days, and replaced by each `make score-all`",
        "public.user_scores",
        Expiry("scored_at", SCORES_DAYS),
    ),
    Place(
        "survey answers",
        "what a person answered to the page's two questions about a list",
        "to know whether people are satisfied and trust it, by arm of an experiment",
        f"{SURVEY_DAYS} days",
        "public.survey_answers",
        Expiry("answered_at", SURVEY_DAYS),
    ),
    Place(
        "consents",
        "what a person said to being personalised, and when",
        "to honour it, and to prove it",
        "until they say otherwise or are forgotten; with the erasure the default holds again",
        "public.consents",
    ),
    Place(
        "exports",
        "a copy of all that is held of a person, for them",
        "so that it can be fetched by its receipt",
        f"{EXPORT_DAYS} days after it was asked for",
        "public.exports",
        Expiry("requested_at", EXPORT_DAYS),
    ),
    Place(
        "requests to be forgotten",
        "who asked to be forgotten and has not been yet",
        "to hide them at once and erase them soon",
        "until the erasure, which deletes it with everything else",
        "public.erasure_requests",
    ),
    Place(
        "tombstones",
        "a keyed hash of the id of each person who was forgotten, its length, and when that was; no id",
        "their old events must not come back with a later load",
        "for good: a tombstone that ends brings the person back",
        "public.tombstones",
    ),
)

_FILES = (
    Place(
        "events in the lake",
        "all events, a Parquet file a day below LAKE_URL/events",
        "the truth that everything else is computed from: features, training sets, lists",
        "no end by age: they go with the person, and the file before a rewrite with the next `make vacuum`",
        readers="who may read LAKE_URL: the orchestrator, never a function",
    ),
    Place(
        "what engines hand each other",
        "parts of events and features, Parquet files below LAKE_URL/scratch",
        "Spark works outside of the process that asked it to",
        "as long as the run that made them; what a killed one left goes with the next erasure or after a week",
        readers="who may read LAKE_URL: the orchestrator, never a function",
    ),
    Place(
        "training sets",
        "labels and features of people, Parquet files below ARTIFACTS_URL/training",
        "what a model is trained on, kept so that it can be repeated",
        "until the next training set replaces it; a forgotten person's file is deleted",
        readers="who may read ARTIFACTS_URL: the orchestrator, and functions, which read only below models/ and encoders/",
    ),
    Place(
        "models",
        "no row of anybody; weights that learned from everybody's events",
        "to rank",
        "a version stays; one trained after an erasure or a refusal has not learned from that person",
        readers="who may read ARTIFACTS_URL",
    ),
    Place(
        "the request log",
        "a line per request without ids, wishes or events; with LARDER_LOG_KEYS a keyed hash of the person",
        "to find what went wrong",
        "as long as the platform keeps a process's output; 30 days are enough",
        readers="who may read the platform's logs",
    ),
    Place(
        "spans and metrics",
        "nothing of a person: no id, no wish, no event",
        "to see where time goes",
        "as long as the collector keeps them",
        readers="who may read the collector's stores",
    ),
    Place(
        "runs of Dagster",
        "nothing of a person: jobs about people are given the id of a request",
        "to see what ran",
        "as long as Dagster keeps runs",
        readers="who may open the Dagster UI",
    ),
    Place(
        "wishes at a language model",
        "with LARDER_LLM_URL the words of a wish, without who said them; else nothing leaves",
        "to read a wish in the words that people use",
        "in memory of the process, the last ones only; what the server keeps is for its operator to say",
        readers="who runs the server of LARDER_LLM_URL",
    ),
)
