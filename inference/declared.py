"""Where experiments are declared: a file, or an object of a bucket, looked at again while requests come.

Beside `experiments.toml` may lie `experiments.stopped.json`, which says what is over before its end.
"""

from __future__ import annotations

import os
from pathlib import Path

from inference import artifacts
from inference.experiment import Experiment, read_experiments, stopped
from schemas.errors import ArtifactError, DefinitionError, StoreUnavailable

CHECK_SECONDS = 1.0
"""A file is looked at at most so often."""
S3_CHECK_SECONDS = 30.0
"""An object at most so often: each look is a request to the bucket."""
STOPPED = ".stopped.json"


class Declared:
    """The declarations at `place`, a path or an `s3://bucket/key`. Where nothing is, no experiment is declared."""

    def __init__(self, place: str) -> None:
        self.places = (place, stopped_place(place))
        self._seen: object = None
        self._remote = place.startswith("s3://")
        self.check_seconds = S3_CHECK_SECONDS if self._remote else CHECK_SECONDS

    def changed(self) -> tuple[Experiment, ...] | None:
        """The experiments, if something was changed since last time, else None.

        Raises DefinitionError for a fault, once: what is looked at again unchanged is nothing new.
        """
        if self._remote:
            try:
                contents = [_object(place) for place in self.places]
            except StoreUnavailable:
                return None  # whether it changed cannot be told now
            seen: object = contents
        else:
            seen = [_stamp(place) for place in self.places]
        if seen == self._seen:
            return None
        self._seen = seen
        if not self._remote:
            contents = [_content(place) for place in self.places]
        declared, over = (_text(content, place) for content, place in zip(contents, self.places, strict=True))
        experiments = () if declared is None else read_experiments(declared, self.places[0])
        return experiments if over is None else stopped(experiments, over, self.places[1])


def stopped_place(place: str) -> str:
    """Where the record of what is over lies, of declarations at `place`."""
    root, slash, name = place.rpartition("/")
    return f"{root}{slash}{name.removesuffix('.toml')}{STOPPED}"


def read(place: str) -> str | None:
    """The text at `place` as it is now, a path or an `s3://bucket/key`; None where nothing is.

    Raises DefinitionError if it cannot be read, StoreUnavailable if a bucket does not say.
    """
    return _text(_object(place) if place.startswith("s3://") else _content(place), place)


def _stamp(place: str) -> tuple[int, ...]:
    try:
        found = os.stat(place)
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _content(place: str) -> bytes | None:
    try:
        return Path(place).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DefinitionError(f"{place} cannot be read ({error.strerror}); mend its rights, or name another") from error


def _object(place: str) -> bytes | None:
    root, _, name = place.rpartition("/")
    try:
        return artifacts.get(root, name)
    except StoreUnavailable:
        raise
    except ArtifactError:
        return None


def _text(content: bytes | None, place: str) -> str | None:
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError as error:
        raise DefinitionError(f"{place} is not UTF-8 ({error.reason} at byte {error.start}); save it so") from error
