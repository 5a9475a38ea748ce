"""How good a scorer is: full-ranking metrics, intervals, one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.assemble import graph_values
from orchestration.compute.co_visitation import Neighbours, WindowedPopularity
from orchestration.compute.splits import Queries, Split
from schemas.ranker import MAX_CANDIDATES, MAX_HISTORY

CUTOFFS = (5, 10, 50)
LISTED = 20
"""Items of a request's list that an evaluation keeps, for what is judged beyond accuracy."""
_PIECE = 32
"""Requests in one run of the graph."""
_DRAWN = 4_000_000
"""People drawn at once for a bootstrap: 32 MB."""


Scorer = Callable[[Queries], NDArray[np.float32]]
"""Takes a batch of queries, gives `(q, items) float32`: higher is better, every item of the catalogue scored.

It may look at the person, the instant and the history, never at the label: labels of one request are scored once.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One scorer's figures: means over labels by cut-off, and the 95 % interval of NDCG@10 over people."""

    name: str
    hr: dict[int, float]
    ndcg: dict[int, float]
    mrr: dict[int, float]
    interval: tuple[float, float]
    ranks: NDArray[np.int64] = field(repr=False, compare=False)  # (q,) 1 is best; for paired comparisons
    lists: NDArray[np.int32] | None = field(default=None, repr=False, compare=False)  # (r, LISTED); see `Judged`
    scores: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)  # (r, LISTED)


@dataclass(frozen=True, slots=True)
class Judged:
    """What a scorer makes of `q` queries with `r` different requests (`Queries.requests`)."""

    ranks: NDArray[np.int64]  # (q,) 1 is best
    lists: NDArray[np.int32]  # (r, LISTED) items not seen before, best first; −1 where there are no more
    scores: NDArray[np.float32]  # (r, LISTED) theirs; 0 where there are no more


@dataclass(frozen=True, slots=True)
class Gain:
    """How much more NDCG one scorer has than another on the same labels, and the paired 95 % interval over people."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Every scorer on one split."""

    split: str
    labels: int
    people: int
    rows: tuple[Row, ...]
    user: NDArray[np.int32] | None = field(default=None, repr=False, compare=False)  # (q,) whose each label is

    def row(self, name: str) -> Row:
        """The row called `name`; KeyError with the known names if there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; known: {', '.join(row.name for row in self.rows)}")

    def gain(self, ranker: str, floor: str, *, k: int = 10, seed: int = 0, resamples: int = 1000) -> Gain:
        """What the row `ranker` has more of NDCG@k than the row `floor`; it beats it where `low` is above 0."""
        if self.user is None:
            raise ValueError("this evaluation does not say whose labels it judged; make it by `evaluate`")
        difference = gain(self.row(ranker).ranks, k) - gain(self.row(floor).ranks, k)
        return Gain(float(difference.mean()), *interval(difference, self.user, seed=seed, resamples=resamples))

    def to_dict(self, judged: str | None = None) -> dict[str, Any]:
        """Plain JSON values, without what is kept by label; with `judged`, the gain of that row over each other."""
        raw: dict[str, Any] = {"split": self.split, "labels": self.labels, "people": self.people}
        per_label = ("ranks", "lists", "scores")
        raw["rows"] = [{key: value for key, value in _fields(row).items() if key not in per_label} for row in self.rows]
        if judged is not None:
            raw["gains"] = {row.name: asdict(self.gain(judged, row.name)) for row in self.rows if row.name != judged}
        return raw

    def table(self) -> str:
        """The figures as aligned text."""
        head = [self.split, *(f"{name}@{k}" for name in ("HR", "NDCG", "MRR") for k in CUTOFFS), "NDCG@10 95 %"]
        lines = [head]
        for row in self.rows:
            figures = [f"{metric[k]:.4f}" for metric in (row.hr, row.ndcg, row.mrr) for k in CUTOFFS]
            lines.append([row.name, *figures, f"{row.interval[0]:.4f}–{row.interval[1]:.4f}"])
        text = aligned(lines)
        return f"{text}\n{self.labels} labels of {self.people} people, all items ranked, seen items removed"


def _fields(row: Row) -> dict[str, Any]:
    return {entry.name: getattr(row, entry.name) for entry in fields(row)}


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def judge(scorer: Scorer, queries: Queries, *, batch: int = 256) -> Judged:
    """Rank each label among all items not seen before, and keep each request's list; ties go to the item listed first.

    Each request is scored once, whatever its labels: of MovieLens' events three quarters share their second.
    """
    first, request = queries.requests()
    asked = queries.take(first)
    result = np.empty(len(queries), np.int64)
    lists = np.full((len(asked), LISTED), -1, np.int32)
    listed = np.zeros((len(asked), LISTED), np.float32)
    # Similar lengths together: a scorer that pads histories then pads little.
    order = np.argsort(asked.stop - asked.start, kind="stable")
    place = np.empty(len(asked), np.int64)
    place[order] = np.arange(len(asked))
    by_place = np.argsort(place[request], kind="stable")
    label_place = place[request][by_place]
    for begin in range(0, len(asked), batch):
        rows = order[begin : begin + batch]
        part = asked.take(rows)
        scores = scorer(part)
        if not np.isfinite(scores).all():
            raise ValueError("a scorer gave a score that is not finite; mask unseen items with a low score instead")
        seen = part.seen()
        best = best_items(scores, seen, LISTED)
        lists[rows] = best
        listed[rows] = np.where(best >= 0, np.take_along_axis(scores, np.maximum(best, 0), axis=1), 0)
        until = int(np.searchsorted(label_place, begin + len(rows)))
        # A request may have any number of labels: as many at a time as there are requests in a batch.
        for some in range(int(np.searchsorted(label_place, begin)), until, batch):
            labels = by_place[some : min(some + batch, until)]
            row, target = place[request[labels]] - begin, queries.target[labels]
            offered = scores[row]
            own = offered[np.arange(len(labels)), target][:, None]
            earlier = np.arange(scores.shape[1])[None, :] < target[:, None]
            better = (offered > own) | ((offered == own) & earlier)
            result[labels] = 1 + (better & ~seen[row]).sum(1)
    return Judged(result, lists, listed)


def best_items(scores: NDArray[np.float32], left_out: NDArray[np.bool_], k: int) -> NDArray[np.int32]:
    """`(q, k)`: the best items of `scores (q, items)` but those `left_out (q, items)`, best first; −1 where there are no more.

    Ties go to the item listed first, as in `ranks`.
    """
    q, items = scores.shape
    # One integer that orders as (score, place in the catalogue) does: a partition then breaks ties as ranks do.
    bits = np.ascontiguousarray(scores + np.float32(0), np.float32).view(np.int32)  # + 0: −0 is 0
    ordered = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int64)
    key = np.where(left_out, np.iinfo(np.int64).max, np.arange(items) - (ordered << 32))  # smallest first
    within = min(k, items)
    here = np.arange(q)[:, None]
    top = np.argpartition(key, within - 1, axis=1)[:, :within]
    top = top[here, np.argsort(key[here, top], axis=1)]
    best = np.full((q, k), -1, np.int32)
    best[:, :within] = np.where(left_out[here, top], -1, top)
    return best


def ranks(scorer: Scorer, queries: Queries, *, batch: int = 256) -> NDArray[np.int64]:
    """`(q,) int64` rank of each label among all items not seen before; ties go to the item listed first."""
    return judge(scorer, queries, batch=batch).ranks


def evaluate(
    scorers: Mapping[str, Scorer], split: Split, *, batch: int = 256, seed: int = 0, resamples: int = 1000
) -> Evaluation:
    """Every scorer on the split's queries."""
    queries = split.queries
    rows = []
    for name, scorer in scorers.items():
        judged = judge(scorer, queries, batch=batch)
        row = summarise(name, judged.ranks, queries.user, seed=seed, resamples=resamples)
        rows.append(replace(row, lists=judged.lists, scores=judged.scores))
    return Evaluation(split.name, len(queries), len(np.unique(queries.user)), tuple(rows), queries.user)


def summarise(
    name: str, rank: NDArray[np.int64], user: NDArray[np.int32], *, seed: int = 0, resamples: int = 1000
) -> Row:
    """Metrics of ranks `(q,)` for labels of people `user (q,)`."""
    return Row(
        name,
        {k: float((rank <= k).mean()) for k in CUTOFFS},
        {k: float(gain(rank, k).mean()) for k in CUTOFFS},
        {k: float(np.where(rank <= k, 1 / rank, 0).mean()) for k in CUTOFFS},
        interval(gain(rank, 10), user, seed=seed, resamples=resamples),
        rank,
    )


def gain(rank: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """NDCG@k of one relevant item: 1 / log2(1 + rank) within the first k, else 0 (Järvelin & Kekäläinen 2002)."""
    return np.where(rank <= k, 1 / np.log2(1 + rank), 0.0)


def interval(
    values: NDArray[np.float64], user: NDArray[np.int32], *, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values (q,)`, drawing people, not labels: one person's labels hang together.

    Give differences of two scorers' gains for a paired comparison.
    """
    low, high = intervals(values[:, None], user, seed=seed, resamples=resamples)
    return float(low[0]), float(high[0])


def intervals(
    values: NDArray[np.float64], user: NDArray[np.int32], *, seed: int = 0, resamples: int = 1000
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`interval` of each column of `values (q, m)`, from the same draws; NaN is a label that a column leaves out.

    Returns low `(m,)` and high `(m,)`; NaN for a column without any label.
    """
    people, index = np.unique(user, return_inverse=True)
    counted = ~np.isnan(values)
    columns = [np.bincount(index, column, len(people)) for column in np.where(counted, values, 0).T]
    columns += [np.bincount(index, column, len(people)) for column in counted.T.astype(np.float64)]
    per_person = np.stack(columns, axis=1)  # (people, 2 m): sums, then counts
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWN // max(len(people), 1))
    sums = []
    for begin in range(0, resamples, at_once):
        n = min(at_once, resamples - begin)
        drawn = generator.integers(0, len(people), (n, len(people))) + np.arange(n)[:, None] * len(people)
        times = np.bincount(drawn.ravel(), minlength=n * len(people)).reshape(n, len(people))
        sums.append(times.astype(np.float64) @ per_person)
    total, count = np.split(np.concatenate(sums), 2, axis=1)
    # A draw may miss everybody of a small column: it says nothing of its mean.
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    known = counted.any(axis=0)
    low, high = np.full((2, values.shape[1]), np.nan)
    if known.any():
        low[known], high[known] = np.nanquantile(mean[:, known], [0.025, 0.975], axis=0)
    return low, high


def score_popularity(counts: NDArray[np.float32]) -> Scorer:
    """The same counts `(items,)` for everybody."""
    return lambda queries: np.broadcast_to(counts, (len(queries), len(counts)))


def score_windowed_popularity(windowed: WindowedPopularity) -> Scorer:
    """What was popular just before each request; the counts go on after the cut, as the feature store's do."""
    return lambda queries: windowed.at_each(queries.at)


def score_co_visitation(neighbours: Neighbours, counts: NDArray[np.float32]) -> Scorer:
    """Neighbours of the history; whatever they leave equal, and people without history, by popularity `(items,)`."""
    fallback = counts / max(float(counts.max(initial=0)), 1.0) * 1e-6

    def score(queries: Queries) -> NDArray[np.float32]:
        return neighbours.score_histories(queries.histories()) + fallback

    return score


@dataclass(frozen=True, slots=True)
class SlateFeatures:
    """Encoded features of `l` labels with `n` candidates each, as of the label's time; masks are 1 where present."""

    context_features: NDArray[np.float32]  # (l, f)
    context_mask: NDArray[np.float32]  # (l, f)
    candidate_features: NDArray[np.float32]  # (l, n, g)
    candidate_mask: NDArray[np.float32]  # (l, n, g)

    def take(self, rows: slice) -> SlateFeatures:
        """Those of some labels."""
        return SlateFeatures(
            self.context_features[rows],
            self.context_mask[rows],
            self.candidate_features[rows],
            self.candidate_mask[rows],
        )


MakeSlates = Callable[[NDArray[np.int64], NDArray[np.int32]], SlateFeatures]
"""Takes label rows `(l,)` of the interactions at hand (those given to `train`, or the queries' own) and candidate items
`(l, n)`, n ≥ 0; gives what was known at each label's time."""


@dataclass(frozen=True, slots=True)
class History:
    """The last events before each query, oldest first, right-aligned; zeros pad. Arrays are `(b, h)`, h ≥ 1."""

    items: NDArray[np.int32]
    kinds: NDArray[np.int64]
    values: NDArray[np.float32]
    gaps: NDArray[np.float32]  # seconds to the next event, the last one's to the request
    mask: NDArray[np.float32]


def history_inputs(queries: Queries) -> History:
    """The queries' histories as the ranker's graph takes them, at most `MAX_HISTORY` events."""
    events = queries.interactions
    start = np.maximum(queries.start, queries.stop - MAX_HISTORY)
    h = max(1, int((queries.stop - start).max(initial=0)))
    row = queries.stop[:, None] - h + np.arange(h)  # (b, h)
    real = row >= start[:, None]
    row = np.where(real, row, 0)
    following = np.concatenate([events.occurred_at[row[:, 1:]], queries.at[:, None]], axis=1)
    gaps = np.where(real, (following - events.occurred_at[row]) / 1e6, 0)
    return History(
        np.where(real, events.item[row], 0).astype(np.int32),
        np.where(real, events.kind[row], 0),
        np.where(real, graph_values(events.value[row]), np.float32(0)),
        gaps.astype(np.float32),
        real.astype(np.float32),
    )


RunRanker = Callable[[dict[str, NDArray[Any]]], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Takes the inputs of `schemas.ranker`, gives `user_vector (b, d)` and `scores (b, n)`: PyTorch or an ONNX session."""


@dataclass(frozen=True, slots=True)
class RankerScorer:
    """The ranker as a `Scorer`: the first `rerank` items by ⟨u, v⟩ get the full score, the rest follow them in order.

    `rerank` None scores the whole catalogue, 0 leaves it at the user vector. `item_vectors (items, d) float32`. Each of
    `sources`, the other candidate sources of serving, gives a quarter of the re-ranked items: its best that are not in yet.
    `wish_vectors`, if given, turns queries into wishes `(q, d)` in item space; a zero row is no wish.
    """

    run: RunRanker
    item_vectors: NDArray[np.float32]
    context_features: int = 1
    candidate_features: int = 1
    slates: MakeSlates | None = None
    rerank: int | None = 500
    wish_vectors: Callable[[Queries], NDArray[np.float32]] | None = None
    sources: tuple[Scorer, ...] = ()

    def inputs(self, queries: Queries, candidates: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
        """The graph's inputs for `candidates (q, n)`."""
        return self._inputs(queries, candidates, self._known(queries, candidates))

    def _known(self, queries: Queries, candidates: NDArray[np.int32]) -> SlateFeatures:
        if self.slates is not None:
            return self.slates(queries.label, candidates)
        context = np.zeros((len(queries), self.context_features), np.float32)
        features = np.zeros((*candidates.shape, self.candidate_features), np.float32)
        return SlateFeatures(context, context, features, features)

    def _inputs(self, queries: Queries, candidates: NDArray[np.int32], known: SlateFeatures) -> dict[str, NDArray[Any]]:
        vectors: NDArray[np.float32] = self.item_vectors
        history = history_inputs(queries)
        wish: NDArray[np.float32] = np.zeros((len(queries), self.item_vectors.shape[1]), np.float32)
        if self.wish_vectors is not None:
            wish = self.wish_vectors(queries)
        has_wish: NDArray[np.float32] = (np.abs(wish).sum(axis=1) > 0).astype(np.float32)
        return {
            "context_features": known.context_features,
            "context_mask": known.context_mask,
            "prompt_vector": wish,
            "prompt_mask": has_wish,
            "history_vectors": np.where(history.mask[:, :, None] > 0, vectors[history.items], np.float32(0)),
            "history_kinds": history.kinds,
            "history_values": history.values,
            "history_gaps": history.gaps,
            "history_mask": history.mask,
            "candidate_vectors": vectors[candidates],
            "candidate_features": known.candidate_features,
            "candidate_mask": known.candidate_mask,
        }

    def _known_of_people(self, queries: Queries) -> SlateFeatures:
        """What was known of the people, with one candidate of which nothing is: all that a user vector needs."""
        known = self._known(queries, np.zeros((len(queries), 0), np.int32))
        nothing = np.zeros((len(queries), 1, self.candidate_features), np.float32)
        return SlateFeatures(known.context_features, known.context_mask, nothing, nothing)

    def _run(
        self, queries: Queries, candidates: NDArray[np.int32], known: SlateFeatures
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`user_vector (q, d)` and `scores (q, n)`, in small pieces: each fits a processor's cache and is padded to its
        own longest history."""
        answers = []
        for begin in range(0, len(queries), _PIECE):
            rows = slice(begin, begin + _PIECE)
            answers.append(self.run(self._inputs(queries.take(rows), candidates[rows], known.take(rows))))
        return np.concatenate([user for user, _ in answers]), np.concatenate([scores for _, scores in answers])

    def __call__(self, queries: Queries) -> NDArray[np.float32]:
        q, items = len(queries), len(self.item_vectors)
        user, _ = self._run(queries, np.zeros((q, 1), np.int32), self._known_of_people(queries))
        similarity = user @ self.item_vectors.T  # (q, items)
        rerank = items if self.rerank is None else min(self.rerank, items)
        if rerank == 0:
            return similarity
        first = self._candidates(queries, similarity, rerank)
        # Below every re-ranked item: similarities lie in ±1, scores are logits.
        scores = similarity - np.float32(1000)
        here = np.arange(q)[:, None]
        for begin in range(0, rerank, MAX_CANDIDATES):
            part = first[:, begin : begin + MAX_CANDIDATES]
            known = self._known(queries, part)
            scores[here, part] = np.maximum(self._run(queries, part, known)[1], np.float32(-900))
        return scores

    def _candidates(self, queries: Queries, similarity: NDArray[np.float32], count: int) -> NDArray[np.int32]:
        """`(q, count)` different items: the nearest by user vector, then the best of each other source."""
        taken = queries.seen()
        here = np.arange(len(queries))[:, None]
        share = count // 4
        picked: list[NDArray[np.int64]] = []
        for scores, size in (
            (similarity, count - share * len(self.sources)),
            *((source(queries), share) for source in self.sources),
        ):
            # Items that are out come last, but a catalogue smaller than the count may still need them.
            best = np.argpartition(np.where(taken, np.inf, -scores), size - 1, axis=1)[:, :size]
            taken[here, best] = True
            picked.append(best)
        return np.concatenate(picked, axis=1).astype(np.int32)

    def offered(self, queries: Queries, count: int) -> NDArray[np.int32]:
        """`(q, count)` different items: those that serving would re-rank, fewer where the catalogue is smaller."""
        user, _ = self._run(queries, np.zeros((len(queries), 1), np.int32), self._known_of_people(queries))
        return self._candidates(queries, user @ self.item_vectors.T, min(count, len(self.item_vectors)))
