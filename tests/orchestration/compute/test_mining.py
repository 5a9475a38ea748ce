"""Labels come from the newest events, and from no events come none."""

from __future__ import annotations

import numpy as np

from orchestration.compute.interactions import Interactions
from orchestration.compute.mining import newest_labels, recent_rows
from orchestration.compute.train_config import TrainConfig


def events(n: int) -> Interactions:
    """`n` people with one event each, a second apart."""
    return Interactions(
        np.array([f"u{number:03}" for number in range(n)], np.str_),
        np.array([f"i{number:03}" for number in range(n)], np.str_),
        np.arange(n, dtype=np.int32),
        np.arange(n, dtype=np.int32),
        np.arange(n, dtype=np.int64) * 1_000_000,
        np.ones(n, np.int64),
        np.full(n, np.nan, np.float32),
    )


def test_labels_are_the_newest_events() -> None:
    config = TrainConfig(validation_rate=0.1)
    assert newest_labels(events(101), config).label.tolist() == list(range(90, 101))
    assert recent_rows(events(101)).tolist() == list(range(60, 101))


def test_no_events_have_no_labels() -> None:
    assert len(newest_labels(events(0), TrainConfig())) == 0
    assert len(recent_rows(events(0))) == 0
