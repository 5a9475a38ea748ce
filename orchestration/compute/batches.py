"""Histories cut into windows, windows into batches, and which state of a window predicts which event."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.interactions import Interactions
from orchestration.compute.model import FIRST_EVENT
from orchestration.compute.splits import burst_starts
from schemas.ranker import MAX_HISTORY


def batches(
    table: NDArray[np.int64], tokens: NDArray[np.int64], budget: int, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Cut `table (m, …)`, sorted by `tokens (m,)`, into batches whose padded size stays near `budget`; shuffled."""
    cut: list[NDArray[np.int64]] = []
    begin = 0
    while begin < len(table):
        stop = begin + 1
        widest = int(tokens[begin])
        while stop < len(table) and max(widest, int(tokens[stop])) * (stop + 1 - begin) <= budget:
            widest = max(widest, int(tokens[stop]))
            stop += 1
        cut.append(table[begin:stop])
        begin = stop
    return [cut[i] for i in generator.permutation(len(cut))]


class HistoryWindows:
    """The windows `(b, 3)` of an epoch: first row, row after the last, 1 where the window begins its person's history."""

    def __init__(self, interactions: Interactions, budget: int, seed: int) -> None:
        self._offsets = interactions.offsets()
        self._burst = burst_starts(interactions)
        self._budget = budget
        self._seed = seed

    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """Batches of windows of similar length, of about `budget` tokens.

        A person with more events than fit is cut at a place that changes with the epoch.
        """
        generator = np.random.default_rng((self._seed, 1, epoch))
        offsets = self._offsets
        size = MAX_HISTORY + 1  # the last event is only a target
        windows: list[tuple[int, int, int]] = []
        phase = generator.integers(0, size, len(offsets) - 1)
        for person, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            begin = first
            stop = end if end - first <= size else first + int(phase[person]) % size + 1
            while begin < end:
                windows.append((begin, stop, int(begin == first)))
                # One event of overlap: the last target of a window is the first input of the next.
                begin, stop = (end, end) if stop == end else (stop - 1, min(stop - 1 + size, end))
        table = np.array(windows, np.int64).reshape(-1, 3)
        length = table[:, 1] - table[:, 0]
        # Jitter mixes neighbours in length, or the same people would meet in every epoch.
        order = np.argsort(length * generator.uniform(0.9, 1.1, len(length)), kind="stable")
        return batches(table[order], length[order] + FIRST_EVENT, self._budget, generator)

    def predictions(
        self, windows: NDArray[np.int64], target_row: NDArray[np.int64], counted: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which state predicts which event: places `(m,)` in the flattened `(b, 1 + h)` states, event rows `(m,)`.

        Column j of `target_row (b, 1 + h)` is what follows state j. Every event where `counted` is predicted from the
        event before it; if that shares its second, also from the last event of an earlier second, as a request would:
        three quarters of MovieLens' events share theirs, and what follows within a second is a list's order, no taste.
        """
        b, width = target_row.shape
        begin, starts = windows[:, :1], windows[:, 2:] > 0
        column = np.broadcast_to(np.arange(width), (b, width))
        burst = self._burst[target_row]
        # The state before a burst: after the row before it, or the prompt's where the person begins with it.
        state = np.where((burst == begin) & starts, 0, column - (target_row - burst))
        known = (burst > begin) | ((burst == begin) & starts)
        earlier = counted & known & (state < column)
        first = np.arange(b)[:, None] * width
        place = np.concatenate([(first + column)[counted], (first + state)[earlier]])
        return place, np.concatenate([target_row[counted], target_row[earlier]])
