"""MovieLens-1M in the file of the SASRec literature, as the product's own arrays: events, item texts, text vectors.

The file knows each person's order and nothing else. Every event is a view without a value; the clock is made up: one
second apart, and everybody's last event at the same instant. Nobody's newest events are then older than another's,
the whole set lies within a day, and the gap to the next event says nothing (`TrainConfig.gaps` can be off).
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.encoder import TextEncoder
from orchestration.compute.co_visitation import co_visitation, popularity
from orchestration.compute.encoder import export_encoder
from orchestration.compute.evaluate import Scorer
from orchestration.compute.interactions import Interactions
from orchestration.compute.splits import Queries, leave_one_out
from orchestration.sources.movielens import _film
from schemas import prompts
from schemas.errors import SourceError
from schemas.events import KINDS

END_AT = datetime(2001, 1, 1, 12, tzinfo=UTC)
"""Everybody's last event; the longest history, 2,277 events, then begins on the same day."""
FILES = ("sequences.txt", "items.csv")
COUNTED: dict[str, Any] = {"k": 300, "decay": 0.7, "backward": 0.1, "popularity_power": 0.4}
LOOKED_UP: dict[str, Any] = {"last": 10, "decay": 0.6}
"""Co-visitation at its best on the validation labels of 2,000 people (NDCG@10 0.154, with the product's settings 0.137)."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The people's events and the catalogue: parallel lists in the order of `interactions.item_ids`."""

    interactions: Interactions
    titles: list[str]
    categories: list[list[str]]
    texts: list[str]  # as the product's item template writes them


def load(folder: Path, *, template: str = prompts.DEFAULTS["item"]) -> Benchmark:
    """The benchmark from `folder`. Raises SourceError if a file, or an item's row, is missing."""
    for name in FILES:
        if not (folder / name).is_file():
            raise SourceError(f"{folder / name} is missing; MovieLens-1M as a benchmark needs {' and '.join(FILES)}")
    lines = (folder / "sequences.txt").read_text(encoding="utf-8").splitlines()
    walks = {user: items.split() for user, _, items in (line.partition("\t") for line in lines if line.strip())}
    user_ids = np.array(sorted(walks), np.str_)
    length = np.array([len(walks[user]) for user in user_ids.tolist()], np.int64)
    events = np.array([item for user in user_ids.tolist() for item in walks[user]], np.str_)
    item_ids, item = np.unique(events, return_inverse=True)
    # Counted from the end: 0 for everybody's last event.
    back = np.repeat(np.cumsum(length), length) - 1 - np.arange(len(events))
    interactions = Interactions(
        user_ids,
        item_ids,
        np.repeat(np.arange(len(user_ids)), length).astype(np.int32),
        item.astype(np.int32),
        int(END_AT.timestamp()) * 1_000_000 - back * 1_000_000,
        np.full(len(events), KINDS.index("view") + 1),
        np.full(len(events), np.nan, np.float32),
    )
    with (folder / "items.csv").open(encoding="utf-8", newline="") as stream:
        rows = {row["item_id"]: row for row in csv.DictReader(stream)}
    if missing := [name for name in item_ids.tolist() if name not in rows]:
        raise SourceError(f"{folder / 'items.csv'} has no row for {len(missing)} items of sequences.txt: {missing[:5]}")
    films = [
        _film(
            name,
            rows[name]["title"],
            tuple(_listed(rows[name]["genres"])),
            {
                "description": rows[name]["plot"],
                "director": _listed(rows[name]["director"]),
                "cast": _listed(rows[name]["actors"]),
            },
        )
        for name in item_ids.tolist()
    ]
    wording = prompts.load(template)
    return Benchmark(
        interactions,
        [film.title for film in films],
        [list(film.categories) for film in films],
        [prompts.render_item(wording, film) for film in films],
    )


def text_vectors(
    benchmark: Benchmark, folder: Path, *, template: str = prompts.DEFAULTS["item"], encoder: TextEncoder | None = None
) -> NDArray[np.float32]:
    """`(items, 384)` text vectors, encoded once per encoder, template and texts; the file lies in `folder`.

    The encoder, if none is given, is exported into `folder` too.
    """
    if encoder is None:
        export_encoder(folder / "encoder")
        encoder = TextEncoder(folder / "encoder")
    texts = hashlib.sha256("\n".join(benchmark.texts).encode()).hexdigest()
    path = folder / f"ml1m-{encoder.version[:16]}-{template}-{texts[:16]}.npy"
    if path.is_file():
        kept: NDArray[np.float32] = np.load(path)
        return kept
    vectors = encoder.encode(benchmark.texts)
    part = path.with_name(f"{path.stem}.part.npy")
    np.save(part, vectors)
    part.replace(path)
    return vectors


def validation_labels(train: Interactions) -> Queries:
    """Each person's last event of `train`, the table that a leave-one-out test leaves: the literature's validation item."""
    last = leave_one_out(train).queries.label
    offsets = train.offsets()
    return Queries(train, last, offsets[train.user[last]], last)


def tuned_co_visitation(train: Interactions) -> Scorer:
    """The floor that has to be beaten here: counts of `train` by the settings that suit this file."""
    neighbours, counts = co_visitation(train, **COUNTED), popularity(train)
    fallback = counts / max(float(counts.max(initial=0)), 1.0) * 1e-6
    return lambda queries: neighbours.score_histories(queries.histories(), **LOOKED_UP) + fallback


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
