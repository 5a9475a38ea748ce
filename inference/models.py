"""The models in memory: the release that serves, loaded aside and put in as one reference; the encoder; the shipped list."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from inference import artifacts
from inference.background import Loading
from inference.breaker import Breaker
from inference.deadline import Pace
from inference.encoder import TextEncoder
from inference.ranker import Answer, Begun, Inputs, Ranker
from inference.store import Champion
from inference.versions import Versions
from schemas.errors import ArtifactError, StoreUnavailable, Unavailable
from schemas.manifest import CHAMPION_POINTER, ENCODER_PATH, POPULAR_ITEMS

logger = logging.getLogger(__name__)

T = TypeVar("T")

_OLDER_SECONDS = 5.0
"""A request that read the alias before a release, and says so after it, is not followed back; a restored database is."""


class ModelFailed(Unavailable):
    """A model raised instead of answering, or cannot answer in the time that is left; another rung does."""


class Superseded(Unavailable):
    """The alias moved on, or another thread was quicker, before this version was loaded: nothing is wrong with it."""


@dataclass(frozen=True, slots=True)
class PopularItem:
    """One place of the shipped list; `categories` and `attributes` None where the list is from before it had them."""

    item_id: str
    title: str
    score: float
    categories: frozenset[str] | None
    attributes: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """A version in memory with what ships with it."""

    champion: Champion
    ranker: Ranker
    popular: Sequence[PopularItem]


@dataclass(slots=True)
class LoadedModels:
    """The models below `artifacts_url`. Requests hold on to one reference, `current()`, from their first question to their
    last: a release that comes meanwhile is the next request's. Safe between threads."""

    artifacts_url: str
    threads: int = 1
    store_breaker: Breaker = field(default_factory=lambda: Breaker("the artefact store", _judge_store))
    ranker_breaker: Breaker = field(default_factory=lambda: Breaker("the ranker"))
    encoder_breaker: Breaker = field(default_factory=lambda: Breaker("the encoder"))
    beside: Versions = field(init=False)
    """What experiments name."""
    _release: Release | None = None
    _wanted: tuple[Champion, Loading[Release]] | None = None
    _wanted_at: float = 0.0
    _encoder: Loading[TextEncoder] = field(init=False)
    _shipped: Loading[Sequence[PopularItem]] = field(init=False)
    _rank_pace: Pace = field(default_factory=Pace)
    _encode_pace: Pace = field(default_factory=Pace)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.beside = Versions(self.open_ranker)
        self._encoder = Loading("the text encoder", self._load_encoder)
        self._shipped = Loading("the shipped list", self._load_shipped)

    # --- the ranker ----------------------------------------------------------------------------------------------

    def current(self) -> Ranker | None:
        """The ranker in memory, if any; never waits."""
        release = self._release
        return release.ranker if release else None

    def follow(self, champion: Champion) -> bool:
        """Make `champion` the release that serves: it is loaded by a thread of its own and swapped in when it is whole.

        False if it was refused, and what is in memory, if anything, goes on in its place.
        """
        loading = self._loading(champion)
        if loading is None:
            return True
        loading.start()
        error = loading.error()
        return error is None or isinstance(error, Superseded)

    def first(self, champion: Champion, wait_ms: float) -> Ranker:
        """The ranker of `champion`, waited for at most `wait_ms`: for a process that has none yet.

        Raises ArtifactError if its files cannot be trusted, Unavailable if it takes longer.
        """
        loading = self._loading(champion)
        release = self._release if loading is None else loading.get(wait_ms)
        if release is None or release.champion.version != champion.version:
            raise Unavailable(f"model {champion.version} is still being loaded")
        return release.ranker

    def begin_ranking(self, ranker: Ranker, person: Inputs, left_ms: float) -> Begun:
        """`ranker.begin(person)`; raises as `run` does."""
        return self._guarded(ranker, lambda: ranker.begin(person), left_ms)

    def finish_ranking(self, ranker: Ranker, begun: Begun, candidates: Inputs, left_ms: float) -> NDArray[np.float32]:
        """`ranker.finish(begun, candidates)`; raises as `run` does."""
        return self._guarded(ranker, lambda: ranker.finish(begun, candidates), left_ms)

    def run(self, ranker: Ranker, inputs: Inputs, left_ms: float, pace: Pace) -> Answer:
        """`ranker.run(inputs)`, `pace` being that of runs of their size.

        Raises ModelFailed if it fails, failed lately, or takes longer than `left_ms`.
        """
        return self._guarded(ranker, lambda: ranker.run(inputs), left_ms, pace)

    def _guarded(self, ranker: Ranker, run: Callable[[], T], left_ms: float, pace: Pace | None = None) -> T:
        # What an experiment's model does must not keep the champion from answering.
        breaker, own_pace = self.beside.guard(ranker) or (self.ranker_breaker, self._rank_pace)
        pace = pace or own_pace
        if not pace.fits(left_ms):
            raise ModelFailed(f"the ranker lately took longer than the {left_ms:.0f} ms that are left")
        started = time.perf_counter()
        try:
            with breaker.call():
                answer = run()
        except Unavailable as resting:
            raise ModelFailed(str(resting)) from resting
        except Exception as error:  # onnxruntime raises its own unrelated types
            logger.error("model %s failed: %s", ranker.version, type(error).__name__)
            raise ModelFailed("the ranker failed") from error
        pace.took((time.perf_counter() - started) * 1_000)
        return answer

    def _loading(self, champion: Champion) -> Loading[Release] | None:
        """The attempt to load `champion`; None if it serves already."""
        with self._lock:
            serving = self._release
            if serving is not None and serving.champion.version == champion.version:
                self._wanted = None  # rolled back before the other was there
                return None
            if self._wanted is not None:
                wanted, loading = self._wanted
                older = champion.revision < wanted.revision and time.monotonic() - self._wanted_at < _OLDER_SECONDS
                if wanted.version == champion.version or older:
                    return loading
            elif (
                serving is not None
                and champion.revision < serving.champion.revision
                and time.monotonic() - self._wanted_at < _OLDER_SECONDS
            ):
                return None
            made = Loading(f"model {champion.version}", lambda: self._load(champion))
            self._wanted, self._wanted_at = (champion, made), time.monotonic()
            return made

    def _load(self, champion: Champion) -> Release:
        with self._one_at_a_time:
            if not self._is_wanted(champion):
                raise Superseded(f"model {champion.version} is not the champion any more")

            ranker = self.open_ranker(champion.version, champion.path)
            release = Release(champion, ranker, read_popular(ranker.folder))
            with self._lock:
                if self._is_wanted(champion):
                    self._release, self._wanted, self._wanted_at = release, None, time.monotonic()
            return release

    def open_ranker(self, version: str, path: str) -> Ranker:
        """The ranker of `version` at `path`, verified. Raises ArtifactError if its files cannot be trusted."""

        def open_folder(folder: Path) -> Ranker:
            return Ranker(folder, version=version, threads=self.threads)

        return self._opened(path, open_folder)

    def _is_wanted(self, champion: Champion) -> bool:
        return self._wanted is not None and self._wanted[0].version == champion.version

    def _opened(self, path: str, open_folder: Callable[[Path], T]) -> T:
        try:
            return open_folder(self._fetch(path))
        except StoreUnavailable:
            raise
        except ArtifactError:
            # A copy in the cache may have been damaged there; the bucket's own is asked once more.
            if not artifacts.discard(self.artifacts_url, path):
                raise
            return open_folder(self._fetch(path))

    def _fetch(self, path: str) -> Path:
        with self.store_breaker.call():
            return artifacts.fetch(self.artifacts_url, path)

    # --- the encoder ---------------------------------------------------------------------------------------------

    def encode(self, text: str, left_ms: float, space: str | None = None) -> NDArray[np.float32]:
        """`text` as a `(384,)` unit vector, by the int8 encoder.

        `space` is the encoder version that the vectors at hand come from: one of another compares nothing with nothing.
        Raises ArtifactError if the encoder is missing, changed or of another space, Unavailable if it is not there in time.
        """
        encoder = self._encoder.get(left_ms)
        if space is not None and encoder.version != space:
            raise ArtifactError(
                f"the model learned from texts encoded by {space}, the encoder is {encoder.version}; train again"
            )
        if not self._encode_pace.fits(left_ms):
            raise ModelFailed(f"the encoder lately took longer than the {left_ms:.0f} ms that are left")
        started = time.perf_counter()
        try:
            with self.encoder_breaker.call():
                vector = encoder.encode_one(text)
        except Unavailable as resting:
            raise ModelFailed(str(resting)) from resting
        except Exception as error:  # the tokeniser and onnxruntime raise their own unrelated types
            raise ModelFailed(f"the encoder failed ({type(error).__name__})") from error
        self._encode_pace.took((time.perf_counter() - started) * 1_000)
        return vector

    def _load_encoder(self) -> TextEncoder:
        return self._opened(ENCODER_PATH, lambda folder: TextEncoder(folder, precision="int8", threads=self.threads))

    # --- the shipped list ----------------------------------------------------------------------------------------

    def popular(self, wait_ms: float) -> Sequence[PopularItem]:
        """The list that ships with the release in memory; without one, with the last release that was published.

        Raises Unavailable without one, or if it is not there within `wait_ms`.
        """
        release = self._release
        if release is not None:
            return release.popular
        try:
            return self._shipped.get(wait_ms)
        except ArtifactError as error:
            raise Unavailable(
                "the database cannot be reached or did not answer in time, and no model was released yet"
            ) from error

    def _load_shipped(self) -> Sequence[PopularItem]:
        version, path = self._pointer()

        def open_list(folder: Path) -> Sequence[PopularItem]:
            manifest = artifacts.verify(folder, (POPULAR_ITEMS,))
            if manifest.version != version:
                raise ArtifactError(
                    f"{path} holds version {manifest.version}, {CHAMPION_POINTER} says {version}; release again"
                )
            return read_popular(folder)

        return self._opened(path, open_list)

    def _pointer(self) -> tuple[str, str]:
        with self.store_breaker.call():
            return read_pointer(artifacts.get(self.artifacts_url, CHAMPION_POINTER))

    # --- all of them ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start to load what most likely serves, before the database could be asked: the release published last."""
        self._encoder.start()
        threading.Thread(target=self._begin_published, name="larder-load-published", daemon=True).start()

    def finish(self, wait_ms: float) -> None:
        """Wait at most `wait_ms` for the encoder. Raises as `encode` does."""
        self._encoder.get(wait_ms)

    def _begin_published(self) -> None:
        try:
            version, path = self._pointer()
        except (ArtifactError, Unavailable):
            return  # nothing was released, or it will be looked for again when it is needed
        # Older than any revision: what the database says goes before it.
        self.follow(Champion(version, 0, path))

    def breakers(self) -> tuple[Breaker, ...]:
        """What guards them, for metrics."""
        return self.store_breaker, self.ranker_breaker, self.encoder_breaker, *self.beside.breakers()


def read_pointer(content: bytes) -> tuple[str, str]:
    """Version and path of `champion.json`. Raises ArtifactError for anything else."""
    try:
        raw: Any = json.loads(content)
        version, path = raw["version"], raw["path"]
        if re.fullmatch(r"[0-9a-f]{16}", version) and isinstance(path, str):
            return version, path
    except (ValueError, TypeError, KeyError):
        pass
    raise ArtifactError(f"{CHAMPION_POINTER} does not name a version and its path; release again")


def read_popular(folder: Path) -> Sequence[PopularItem]:
    """The list in a verified artefact. Raises ArtifactError if it is not one."""
    try:
        rows: Any = json.loads((folder / POPULAR_ITEMS).read_text(encoding="utf-8"))
        return tuple(
            PopularItem(
                row["item_id"],
                row["title"],
                float(row["score"]),
                frozenset(row["categories"]) if "categories" in row else None,
                dict(row["attributes"]) if "attributes" in row else None,
            )
            for row in rows
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{folder / POPULAR_ITEMS} is not a list of ours; release again") from error


def _judge_store(error: Exception) -> bool | None:
    return not isinstance(error, StoreUnavailable)
