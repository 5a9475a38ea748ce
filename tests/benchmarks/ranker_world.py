"""What the ranker bench learns from: MovieLens where it lies beside the checkout, else a simulated world in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from inference.encoder import TextEncoder
from orchestration.compute.encoder import export_encoder
from orchestration.compute.ingest import ingest
from orchestration.compute.interactions import Interactions, load_interactions
from orchestration.compute.lake import Lake
from orchestration.compute.prompt_records import PromptVersions
from orchestration.compute.splits import Split, leave_one_out, time_split
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.training_set import load_categories
from orchestration.compute.vectors import load_text_vectors, refresh_text_vectors, written_by
from orchestration.compute.wish_texts import wishes_for
from orchestration.compute.wishes import Wishes
from orchestration.sources.open import is_simulated, open_source, simulated_world
from orchestration.sources.simulator import Simulator
from schemas import prompts
from schemas.events import KINDS, Event, Item
from schemas.manifest import ENCODER_PATH
from tests.benchmarks import ml1m
from tests.benchmarks.features_world import place

DATA = Path(__file__).parents[2].parent / "shared" / "data"
SIMULATED_START = date(2026, 1, 1)
"""A fixed day: the simulated world of the sequences is then the same whenever it is simulated."""


# Nothing is known of the events but their order, so the second stage, which teaches features, would have nothing to teach.
# The cosine schedule ends with the epochs: stopping early would only leave it unfinished.
SEQUENCES = TrainConfig(epochs=12, dropout=0.1, bfloat16=True, slate_epochs=0, validate_every=5, patience=12)
"""For MovieLens-1M: what two cores train in a quarter of an hour."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is learned from, how long, and how much is measured."""

    sequences: str = str(DATA / "ml-1m")
    dated: str = str(DATA / "ml-100k")
    sequences_config: TrainConfig = SEQUENCES
    dated_config: TrainConfig = TrainConfig()  # noqa: RUF009  # frozen
    judged: int = 100_000
    """Labels of a split that are judged at most."""
    requests: int = 1024
    """Requests that calibrate int8, and as many others that judge it."""
    resamples: int = 1000
    runs: int = 200
    """Requests of each kind that are timed."""
    texts: int = 500
    rounds: int = 5
    """Texts that are encoded in each of so many rounds."""

    @property
    def simulated(self) -> bool:
        return is_simulated(self.sequences)


def sizes_for(quick: bool) -> Sizes:
    """MovieLens if both folders are there, else the simulator's default world; the smallest world for a quick run."""
    if quick:
        few = TrainConfig(epochs=2, slate_rows=100, validation_labels=50, batch_tokens=1024)
        world = "simulated?people=150&items=120&days=40&events_per_person=25"
        return Sizes(world, world, few, few, judged=60, requests=60, resamples=100, runs=5, texts=40, rounds=1)
    if all((DATA / name).is_file() for name in ("ml-1m/sequences.txt", "ml-1m/items.csv", "ml-100k/u.data")):
        return Sizes()
    return Sizes("simulated", "simulated")


@dataclass(frozen=True, slots=True)
class Sequences:
    """The benchmark of sequences: its catalogue, its leave-one-out split, and what a person may say they want."""

    benchmark: ml1m.Benchmark
    text_vectors: NDArray[np.float32]  # (items, 384)
    split: Split
    wishes: Wishes
    genres: list[str]  # names of the wishes' categories, in their order
    simulator: Simulator | None = None  # which knows what people truly like; None for MovieLens


def sequences(sizes: Sizes, folder: Path) -> Sequences:
    """MovieLens-1M, or the simulated world; encoder and vectors are kept in `folder`."""
    simulator = simulator_of(sizes)
    made = catalogue_of(sizes)
    encoder_at = encoder_folder(folder)
    vectors = ml1m.text_vectors(made, folder, encoder=TextEncoder(encoder_at))
    names = sorted({name for held in made.categories for name in held})
    wording = prompts.load(prompts.DEFAULTS["wish"])
    said = TextEncoder(encoder_at, precision="int8").encode([wording.render({"wish": name}) for name in names])
    member = np.array([[name in held for name in names] for held in made.categories], bool)
    return Sequences(made, vectors, leave_one_out(made.interactions), Wishes(said, member), names, simulator)


def simulator_of(sizes: Sizes) -> Simulator | None:
    """The world that stands in for MovieLens-1M; None where that is there."""
    if not sizes.simulated:
        return None
    world = simulated_world(sizes.sequences, SIMULATED_START)
    return Simulator(world, world.started_at + timedelta(days=world.days))


def catalogue_of(sizes: Sizes) -> ml1m.Benchmark:
    """Events and texts of MovieLens-1M, or of the simulated world."""
    simulator = simulator_of(sizes)
    return _simulated(simulator) if simulator else ml1m.load(Path(sizes.sequences))


def encoder_folder(folder: Path) -> Path:
    """The text encoder in `folder`, exported on first use."""
    export_encoder(folder / ENCODER_PATH)
    return folder / ENCODER_PATH


def _simulated(source: Simulator) -> ml1m.Benchmark:
    """A simulated world's events and catalogue, as the benchmark has MovieLens's."""
    items = {item.item_id: item for item in source.items() if isinstance(item, Item)}
    events = sorted(
        (event for event in source.events() if isinstance(event, Event)),
        key=lambda event: (event.user_id, event.occurred_at, event.event_id),
    )
    item_ids = np.array(sorted(items), np.str_)
    user_ids, user = np.unique(np.array([event.user_id for event in events], np.str_), return_inverse=True)
    interactions = Interactions(
        user_ids,
        item_ids,
        user.astype(np.int32),
        np.searchsorted(item_ids, np.array([event.item_id for event in events], np.str_)).astype(np.int32),
        np.array([_micros(event.occurred_at) for event in events], np.int64),
        np.array([KINDS.index(event.kind) + 1 for event in events], np.int64),
        np.array([np.nan if event.value is None else event.value for event in events], np.float32),
        np.array([_micros(items[name].available_at) for name in item_ids.tolist()], np.int64),
    )
    wording = prompts.load(prompts.DEFAULTS["item"])
    listed = [items[name] for name in item_ids.tolist()]
    return ml1m.Benchmark(
        interactions,
        [item.title for item in listed],
        [list(item.categories) for item in listed],
        [prompts.render_item(wording, item) for item in listed],
    )


def _micros(instant: datetime | None) -> int:
    """Microseconds since 1970; the beginning of time for what has always been there."""
    return int(np.iinfo(np.int64).min) if instant is None else int(instant.timestamp()) * 1_000_000


@dataclass(frozen=True)
class Dated:
    """A deployment whose events have times: its database, its lake, its artefacts (the encoder), its time split."""

    url: str
    lake: Lake
    encoder_at: Path
    folder: Path
    split: Split
    categories: list[list[str]]

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url, options="-c TimeZone=UTC")

    def text_vectors(self, connection: psycopg.Connection[Any], interactions: Interactions) -> NDArray[np.float32]:
        """`(items, 384)` in the interactions' order."""
        writer = written_by(PromptVersions().item, TextEncoder(self.encoder_at).version)
        return load_text_vectors(connection, interactions.item_ids, writer)

    def wishes(self, connection: psycopg.Connection[Any], interactions: Interactions) -> Wishes:
        """What a person may say they want, as serving encodes it."""
        encoder = TextEncoder(self.encoder_at, precision="int8")
        return wishes_for(connection, interactions, encoder, PromptVersions())


@contextmanager
def dated(sizes: Sizes, server: str, scratch: Path, folder: Path) -> Iterator[Dated]:
    """MovieLens-100K (or the simulated world) as `make run` takes it in: shifted by whole weeks, into lake and database,
    its texts encoded. The encoder is kept in `folder`, all else goes with `scratch`."""
    encoder_at = encoder_folder(folder)
    now = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    days = simulated_world(sizes.dated, now.date()).days if is_simulated(sizes.dated) else 0
    source = open_source(sizes.dated, start=now.date() - timedelta(days=days), until=now)
    shift = (now - source.time_range()[1]).days // 7 * 7 if source.historical else 0
    with place(server, scratch, "ranker") as where, where.connect() as connection:
        ingest(source, where.lake, connection, shift_days=shift)
        connection.commit()
        refresh_text_vectors(connection, TextEncoder(encoder_at, threads=0))
        interactions = load_interactions(where.lake, connection)
        split = time_split(interactions)
        chosen = np.random.default_rng(0).permutation(len(split.queries))[: sizes.judged]
        split = replace(split, queries=split.queries.take(np.sort(chosen)))
        categories = load_categories(connection, interactions)
        connection.commit()
        yield Dated(where.url, where.lake, encoder_at, where.folder, split, categories)
