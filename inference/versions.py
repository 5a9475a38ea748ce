"""The released versions that experiments name, in memory beside the champion: verified as it is, loaded in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from inference.background import Loading
from inference.breaker import Breaker
from inference.deadline import Pace
from inference.ranker import Ranker
from inference.sql_files import statement
from inference.store import Store
from schemas.errors import ArtifactError

logger = logging.getLogger(__name__)

MOST_MISSING = 0.01
"""Of so many items may a version lack vectors: those that came since the catalogue was last brought up to date."""
_LOOK_UP_MS = 10_000

Find = Callable[[str], str]
"""The path of a version's files. Raises ArtifactError if it may not answer."""


class Versions:
    """At most the few that `keep` was told of. A request never waits for one: what is not there yet is None."""

    def __init__(self, open_ranker: Callable[[str, str], Ranker]) -> None:
        self._open = open_ranker
        self._loading: dict[str, Loading[Ranker]] = {}
        self._guards: dict[str, tuple[Breaker, Pace]] = {}
        self._lock = threading.Lock()

    def keep(self, versions: Iterable[str], find: Find) -> None:
        """Hold exactly these: begin to load what is not there, let go of the rest. Never waits."""
        wanted = tuple(versions)
        with self._lock:
            # New dictionaries, so that a request in the middle of reading one never meets a change.
            self._loading = {version: self._loading.get(version) or self._make(version, find) for version in wanted}
            self._guards = {
                version: self._guards.get(version) or (Breaker(f"model {version}"), Pace()) for version in wanted
            }
            loadings = tuple(self._loading.values())
        for loading in loadings:
            loading.start()

    def get(self, version: str) -> Ranker | None:
        """The ranker of `version` if it is in memory and not failing; else it is loaded, unless that failed a moment ago."""
        loading = self._loading.get(version)
        if loading is None:
            return None
        ranker = loading.peek()
        if ranker is None:
            loading.start()
            return None
        guard = self._guards.get(version)
        return None if guard is not None and guard[0].state == "open" else ranker

    def guard(self, ranker: Ranker) -> tuple[Breaker, Pace] | None:
        """What keeps requests from one of these versions that fails or is slow; None for any other model."""
        loading = self._loading.get(ranker.version)
        # The champion may be a version that is also named here: its own object keeps its own guard.
        return self._guards.get(ranker.version) if loading is not None and loading.peek() is ranker else None

    def refused(self) -> tuple[str, ...]:
        """The versions that could not be loaded."""
        return tuple(
            version
            for version, loading in self._loading.items()
            if loading.peek() is None and loading.error() is not None
        )

    def loaded(self) -> tuple[Ranker, ...]:
        """Those that are in memory."""
        found = (loading.peek() for loading in self._loading.values())
        return tuple(ranker for ranker in found if ranker is not None)

    def breakers(self) -> tuple[Breaker, ...]:
        """One for each."""
        return tuple(breaker for breaker, _ in self._guards.values())

    def _make(self, version: str, find: Find) -> Loading[Ranker]:
        return Loading(f"model {version} of an experiment", lambda: self._open(version, find(version)))


def finder(store: Store) -> Find:
    """Looks versions up in the registry: only one that passed its gate and knows the catalogue may answer."""

    def find(version: str) -> str:
        rows = store.rows(statement("read_release"), {"version": version}, _LOOK_UP_MS)
        if not rows:
            raise ArtifactError(f"there is no model version {version}; look into model_versions")
        path, passed, items, missing = rows[0]
        if not passed:
            raise ArtifactError(f"model {version} has no passed gate record, so no experiment may show or shadow it")
        if missing > MOST_MISSING * items:
            raise ArtifactError(
                f"model {version} lacks vectors of {missing} of {items} items; materialise item_vectors with it in `also`"
            )
        return str(path)

    return find
