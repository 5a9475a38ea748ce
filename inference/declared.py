"""Where experiments are declared: a file, or an object of a bucket, looked at again while requests come."""

from __future__ import annotations

import os
from pathlib import Path

from inference import artifacts
from inference.experiment import Experiment, load_experiments, read_experiments
from schemas.errors import ArtifactError, DefinitionError, StoreUnavailable

CHECK_SECONDS = 1.0
"""A file is looked at at most so often."""
S3_CHECK_SECONDS = 30.0
"""An object at most so often: each look is a request to the bucket."""


class Declared:
    """The declarations at `place`, a path or an `s3://bucket/key`. Where nothing is, no experiment is declared."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._seen: object = None
        self._remote = place.startswith("s3://")
        self.check_seconds = S3_CHECK_SECONDS if self._remote else CHECK_SECONDS

    def changed(self) -> tuple[Experiment, ...] | None:
        """The experiments, if they are others than last time, else None.

        Raises DefinitionError for a fault, once: what is looked at again unchanged is nothing new.
        """
        return self._object() if self._remote else self._file()

    def _file(self) -> tuple[Experiment, ...] | None:
        try:
            found = os.stat(self.place)
            seen: tuple[int, ...] = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError:
            seen = ()
        if seen == self._seen:
            return None
        self._seen = seen
        return load_experiments(Path(self.place))

    def _object(self) -> tuple[Experiment, ...] | None:
        root, _, name = self.place.rpartition("/")
        try:
            seen = artifacts.get(root, name)
        except StoreUnavailable:
            return None  # whether it changed cannot be told now
        except ArtifactError:
            seen = b""
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            text = seen.decode()
        except UnicodeDecodeError as error:
            raise DefinitionError(
                f"{self.place} is not UTF-8 ({error.reason} at byte {error.start}); save it so"
            ) from error
        return read_experiments(text, self.place)
