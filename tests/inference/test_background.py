"""Values that are made beside the requests: what one that failed leaves behind."""

from __future__ import annotations

import gc
import traceback
import weakref

import numpy as np
import pytest

from inference.background import Loading
from schemas.errors import ArtifactError, Unavailable


def test_a_failure_that_many_are_told_of_keeps_nothing_of_theirs() -> None:
    def load() -> int:
        raise ArtifactError("the thing is missing; release again")

    loading = Loading("the thing", load)
    held: list[weakref.ref[np.ndarray]] = []

    def request() -> None:
        large = np.zeros(100)
        held.append(weakref.ref(large))
        loading.get(1_000)

    for _ in range(20):
        with pytest.raises(ArtifactError, match="the thing is missing") as told:
            request()
        assert told.value is not loading.error()
    del told
    gc.collect()
    error = loading.error()
    assert error is not None
    assert len(traceback.extract_tb(error.__traceback__)) <= 2
    assert [one for one in held if one() is not None] == []


def test_what_is_told_is_the_same() -> None:
    def load() -> int:
        raise Unavailable("later", retry_after_seconds=7)

    with pytest.raises(Unavailable, match="later") as told:
        Loading("the thing", load).get(1_000)
    assert told.value.retry_after_seconds == 7
    assert isinstance(told.value.__cause__, Unavailable)
