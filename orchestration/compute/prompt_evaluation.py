"""How good a prompt template is, without training a ranker for each: a small text-only model is learned and asked.

A template is judged by what it decides: an item's by cold items, a profile's or a wish's by how far a list moves towards
a wish, provided that what is shown without one does not suffer.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from inference.encoder import TextEncoder
from orchestration.compute.co_visitation import popularity, positive
from orchestration.compute.evaluate import Scorer, interval, ranks
from orchestration.compute.interactions import Interactions, load_interactions
from orchestration.compute.lake import Lake
from orchestration.compute.prompt_records import (
    Judged,
    PromptVersions,
    judged,
    read_versions,
    record_figures,
    record_winner,
)
from orchestration.compute.splits import Queries, leave_one_out, queries_for, time_split
from orchestration.compute.text_taste import LAST, TextTaste, histories_of, learn_taste
from orchestration.compute.vectors import Encode, unless_known
from orchestration.compute.wish_texts import category_wishes, membership
from orchestration.compute.wishes import Wishes
from schemas import prompts
from schemas.errors import DefinitionError
from schemas.events import Item

HIDDEN_RATE = 0.1
"""Of the items with events: hidden from learning, then looked for."""
FOLDS = 4
"""So many different tenths are hidden in turn: which items are hidden moves recall more than which people are asked
(0.151 and 0.179 for one template and two tenths of MovieLens-100K)."""
JUDGED = 4_000
"""Labels and people asked about in a fold at most, by seed."""
FIRST = 50
SHOWN = 20
LEAST_ITEMS = 20
"""A category with fewer items cannot fill a list, so its share says nothing."""
LEAST_LABELS = 100


@dataclass(frozen=True, slots=True)
class PromptData:
    """What templates are judged on: positive events, the items they are of in the order of `events.item_ids`."""

    events: Interactions
    items: list[Item]
    hidden: NDArray[np.bool_]  # (folds, items)

    def conditions(self, kind: str, base: PromptVersions, encoder_version: str) -> str:
        """Hash of all that decides a template's figures beside itself: only equal ones are compared."""
        others = {name: version for name, version in asdict(base).items() if name != kind}
        digest = hashlib.sha256(f"{encoder_version} {sorted(others.items())} {JUDGED}".encode())
        for item in self.items:
            digest.update(repr((item.item_id, item.title, item.description, item.categories)).encode())
        for array in (self.events.user, self.events.item, self.events.occurred_at, self.hidden):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class PromptFigures:
    """What one template scored. Recalls are of 50, lifts of the first 20; `_low` and `_high` are a 95 % interval, over
    hidden items and over people.

    `cold_item_recall`: of events with hidden items; `neighbours_recall`: the same by neighbours of the text vectors,
    nothing learned; `warm_recall`: of each person's last event, no wish given; `genre_lift`: how many times as often as in
    the catalogue a category is in the list for its wish alone; `genre_lift_with_history`: the same for people who wish for
    what they like most. `_folds` are the figures that decide, fold by fold.
    """

    cold_item_recall: float
    cold_item_recall_low: float
    cold_item_recall_high: float
    neighbours_recall: float
    warm_recall: float
    warm_recall_low: float
    warm_recall_high: float
    genre_lift: float
    genre_lift_with_history: float
    cold_item_recall_folds: tuple[float, ...]
    genre_lift_folds: tuple[float, ...]
    cold_labels: int
    categories: int
    seconds: float

    def numbers(self) -> dict[str, float]:
        """Every single figure by name."""
        return {name: value for name, value in asdict(self).items() if not name.endswith("_folds")}


DECIDES = {"item": "cold_item_recall", "profile": "genre_lift", "wish": "genre_lift"}
"""The figure that a template of each kind is chosen by: higher is better."""


def load_prompt_data(lake: Lake, connection: psycopg.Connection[Any]) -> PromptData:
    """The catalogue, and the lake's events but for those that judge rankers: a template must not be chosen by them.

    Raises DefinitionError if there are too few events to judge anything.
    """
    everything = load_interactions(lake, connection)
    events = leave_one_out(everything).train
    events = events.take(events.occurred_at <= time_split(everything).train.occurred_at.max(initial=0))
    found = {
        row[0]: Item(row[0], row[1], row[2], tuple(row[3]))
        for row in connection.execute("SELECT item_id, title, description, categories FROM items")
    }
    return prompt_data(events, [found[item_id] for item_id in events.item_ids.tolist()])


def prompt_data(events: Interactions, items: Sequence[Item], *, seed: int = 0) -> PromptData:
    """Hide some items, others in every fold. Raises DefinitionError if there are too few events to judge anything."""
    liked = events.take(positive(events.kind))
    seen = np.random.default_rng((seed, 9)).permutation(np.flatnonzero(np.bincount(liked.item, minlength=len(items))))
    size = int(len(seen) * HIDDEN_RATE)
    hidden = np.zeros((FOLDS, len(items)), bool)
    for fold in range(FOLDS):
        hidden[fold, seen[fold * size : (fold + 1) * size]] = True
    if (labels := int(hidden[:, liked.item].sum())) < LEAST_LABELS:
        raise DefinitionError(
            f"{labels} events with hidden items are too few to judge a template by: {LEAST_LABELS} are needed, about "
            f"{int(LEAST_LABELS / HIDDEN_RATE / FOLDS)} events in all. Until then the templates that are in use stay"
        )
    return PromptData(liked, list(items), hidden)


def judge(
    data: PromptData, version: str, base: PromptVersions, encode_items: Encode, encode_wishes: Encode, *, seed: int = 0
) -> PromptFigures:
    """What template `version` scores where the other kinds are as in `base`."""
    began = time.monotonic()
    versions = replace(base, **{prompts.load(version).kind: version})
    wording = prompts.load(versions.item)
    texts = encode_items([prompts.render_item(wording, item) for item in data.items])
    names, member = membership([item.categories for item in data.items])
    wish_texts = category_wishes(versions, names, member, [item.title for item in data.items], popularity(data.events))
    wishes = Wishes(encode_wishes(wish_texts), member)
    folds = [_judge_fold(data.events, hidden, texts, wishes, seed) for hidden in data.hidden]
    cold = [np.concatenate([getattr(fold, name) for fold in folds]) for name in ("cold", "cold_item", "neighbours")]
    warm = [np.concatenate([getattr(fold, name) for fold in folds]) for name in ("warm", "warm_user")]
    cold_low, cold_high = interval(cold[0], cold[1])
    warm_low, warm_high = interval(warm[0], warm[1])
    return PromptFigures(
        cold_item_recall=float(cold[0].mean()),
        cold_item_recall_low=cold_low,
        cold_item_recall_high=cold_high,
        neighbours_recall=float(cold[2].mean()),
        warm_recall=float(warm[0].mean()),
        warm_recall_low=warm_low,
        warm_recall_high=warm_high,
        genre_lift=float(np.mean([fold.lift for fold in folds])),
        genre_lift_with_history=float(np.mean([fold.lift_with_history for fold in folds])),
        cold_item_recall_folds=tuple(float(fold.cold.mean()) for fold in folds),
        genre_lift_folds=tuple(fold.lift for fold in folds),
        cold_labels=len(cold[0]),
        categories=len(countable(member)),
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True, slots=True)
class _Fold:
    """Hits within the first 50 for labels with hidden items `(c,)` and for last events `(w,)`, of which item and person."""

    cold: NDArray[np.float64]
    cold_item: NDArray[np.int32]
    neighbours: NDArray[np.float64]
    warm: NDArray[np.float64]
    warm_user: NDArray[np.int32]
    lift: float
    lift_with_history: float


def _judge_fold(
    events: Interactions, hidden: NDArray[np.bool_], texts: NDArray[np.float32], wishes: Wishes, seed: int
) -> _Fold:
    known = ~hidden
    visible = events.take(known[events.item])
    last = visible.offsets()[1:][np.diff(visible.offsets()) >= 2] - 1
    keep = np.ones(len(visible), bool)
    keep[last] = False
    taste = learn_taste(texts, visible.take(keep), known, wishes, seed=seed)

    def by_taste(queries: Queries) -> NDArray[np.float32]:
        return taste.score(histories_of(queries, known))

    def by_neighbours(queries: Queries) -> NDArray[np.float32]:
        history = histories_of(queries, known)
        profile = (texts[np.maximum(history, 0)] * (history >= 0)[:, :, None]).sum(1)  # (q, 384)
        return np.asarray(profile @ texts.T, np.float32)

    cold = _some(queries_for(events, np.flatnonzero(hidden[events.item]), strictly_earlier=False), seed)
    warm = _some(queries_for(visible, last, strictly_earlier=False), seed)
    return _Fold(
        _hits(by_taste, cold),
        cold.target,
        _hits(by_neighbours, cold),
        _hits(by_taste, warm),
        warm.user,
        _lift_alone(taste, wishes),
        _lift_with_history(taste, wishes, warm, known),
    )


def countable(member: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Categories whose items could fill a list, of `member (items, c)`."""
    return np.flatnonzero(member.sum(0) >= min(LEAST_ITEMS, len(member))).astype(np.int64)


def lift(scores: NDArray[np.float32], wished: NDArray[np.int64], member: NDArray[np.bool_]) -> float:
    """How many times as often as in the catalogue the categories `wished (b,)` are in the first 20 by `scores (b, items)`.

    Mean share over mean share, `member (items, c)`: no rare category rules. 0 of no wishes.
    """
    if not len(wished):
        return 0.0
    shown = min(SHOWN, scores.shape[1])
    first = np.argsort(-scores, axis=1, kind="stable")[:, :shown]  # (b, shown)
    return float(member[first, wished[:, None]].mean() / member.mean(0)[wished].mean())


def choose(rows: Sequence[Judged], kind: str, current: str) -> Judged | None:
    """The template of `kind` to be used, once every one of those that are known has been judged; None until then.

    It takes more than a better figure to replace the `current` one, for all that is encoded follows: the figure must be
    better in every fold, and a profile or a wish must not make lists without a wish worse beyond chance.
    """
    if {row.version for row in rows} != set(prompts.versions(kind)):
        return None
    now = next((row for row in rows if row.version == current), None)
    decides = DECIDES[kind]
    if now is None:
        return max(rows, key=lambda row: float(row.figures[decides]))
    better = [
        row
        for row in rows
        if all(np.greater(row.figures[f"{decides}_folds"], now.figures[f"{decides}_folds"]))
        and (kind == "item" or row.figures["warm_recall"] >= now.figures["warm_recall_low"])
    ]
    return max(better, key=lambda row: float(row.figures[decides]), default=now)


def _hits(scorer: Scorer, queries: Queries) -> NDArray[np.float64]:
    """`(q,)` 1 where the label is within the first 50."""
    return (ranks(scorer, queries) <= FIRST).astype(np.float64)


def _some(queries: Queries, seed: int) -> Queries:
    chosen = np.random.default_rng((seed, 10)).permutation(len(queries))[:JUDGED]
    return queries.take(np.sort(chosen))


def _lift_alone(taste: TextTaste, wishes: Wishes) -> float:
    """Lift in the lists for every category's wish alone."""
    chosen = countable(wishes.item_categories)
    nobody = np.full((len(chosen), LAST), -1, np.int64)
    return lift(taste.score(nobody, wishes.category_vectors[chosen]), chosen, wishes.item_categories)


def _lift_with_history(taste: TextTaste, wishes: Wishes, queries: Queries, known: NDArray[np.bool_]) -> float:
    history = histories_of(queries, known)
    counted = countable(wishes.item_categories)
    if not len(counted):
        return 0.0
    member = wishes.item_categories[:, counted]
    had = (member[np.maximum(history, 0)] & (history >= 0)[:, :, None]).sum(1)  # (q, c)
    # What a person likes more than the catalogue has it, or everybody would wish for the largest category.
    liked = np.argmax(np.where(had >= 3, had / member.mean(0), 0), axis=1)
    asks = (had >= 3).any(1)
    if not asks.any():
        return 0.0
    wished = counted[liked[asks]]
    scores = taste.score(history[asks], wishes.category_vectors[wished])
    scores[queries.seen()[asks]] = -np.inf
    return lift(scores, wished, wishes.item_categories)


@dataclass(frozen=True, slots=True)
class PromptReport:
    """One judged template among its kind's, under equal conditions; `winner` None while some wait to be judged."""

    kind: str
    version: str
    figures: PromptFigures
    rows: list[Judged]
    current: str
    winner: str | None
    waiting: tuple[str, ...]

    def words(self) -> str:
        """What was found and what follows, in one line."""
        decides = DECIDES[self.kind]
        found = f"{self.version}: {decides.replace('_', ' ')} {getattr(self.figures, decides):.3f}"
        if self.winner is None:
            return f"{found}; {self.current} stays until {', '.join(self.waiting)} are judged on the same data"
        if self.winner == self.current:
            return f"{found}; {self.current} stays the best of its kind"
        return f"{found}; {self.winner} takes the place of {self.current}: text vectors and the next training follow it"


def evaluate_template(
    connection: psycopg.Connection[Any],
    data: PromptData,
    version: str,
    base: PromptVersions,
    encoder: TextEncoder,
    wish_encoder: TextEncoder,
) -> PromptReport:
    """Judge `version`, record its figures and, once all of its kind are judged, which of them wins.

    `base` are the versions of the other kinds to judge it with: those in use.
    """
    kind = prompts.load(version).kind
    conditions = data.conditions(kind, base, encoder.version)
    figures = judge(data, version, base, unless_known(connection, encoder), wish_encoder.encode)
    with connection.transaction():
        # One at a time: of two that judge the last two templates, one must see both.
        connection.execute("SELECT pg_advisory_xact_lock(hashtext('prompt_winners'))")
        record_figures(connection, version, conditions, asdict(figures))
        rows = judged(connection, kind, conditions)
        current = getattr(read_versions(connection), kind)
        best = choose(rows, kind, current)
        if best is not None:
            record_winner(connection, best)
    waiting = tuple(name for name in prompts.versions(kind) if name not in {row.version for row in rows})
    return PromptReport(kind, version, figures, rows, current, best.version if best else None, waiting)
