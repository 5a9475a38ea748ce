"""All that is reported of an evaluation, from ranks and lists that are there already: nothing is scored again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.beyond_accuracy import (
    BeyondAccuracy,
    Reliability,
    beyond_accuracy,
    beyond_accuracy_table,
    pick_reliability,
)
from orchestration.compute.candidate_recall import CandidateRecall
from orchestration.compute.evaluate import Evaluation, Gain, aligned
from orchestration.compute.segments import Segment, segment_table, segments
from orchestration.compute.splits import Split


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation with everything beside it; `judged` is the row whose gains over the others are given."""

    evaluation: Evaluation
    judged: str
    gains: dict[str, Gain]
    segments: dict[str, list[Segment]]
    beyond_accuracy: dict[str, BeyondAccuracy]
    reliability: Reliability | None
    candidates: CandidateRecall | None
    by_segment: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.evaluation.to_dict() | {
            "gains": {name: asdict(gain) for name, gain in self.gains.items()},
            "segments": {name: [asdict(segment) for segment in found] for name, found in self.segments.items()},
            "beyond_accuracy": {name: asdict(figures) for name, figures in self.beyond_accuracy.items()},
            "reliability": None if self.reliability is None else asdict(self.reliability),
            "candidates": None if self.candidates is None else asdict(self.candidates),
        }

    def tables(self) -> str:
        """The figures as aligned text, a table below the other."""
        gains = [["NDCG@10 gained over", "mean", "95 %"]]
        gains += [[name, f"{gain.mean:+.4f}", f"{gain.low:+.4f}–{gain.high:+.4f}"] for name, gain in self.gains.items()]
        parts = [self.evaluation.table(), aligned(gains), self.by_segment, beyond_accuracy_table(self.beyond_accuracy)]
        if self.reliability is not None:
            parts.append(
                f"{self.judged}: says {self.reliability.mean_probability:.4f} of a listed item, {self.reliability.hit_rate:.4f} "
                f"are picked, calibration error {self.reliability.ece:.4f}"
            )
        if self.candidates is not None:
            parts.append(self.candidates.table())
        return "\n\n".join(parts)


def report(
    evaluation: Evaluation,
    split: Split,
    judged: str,
    *,
    text_vectors: NDArray[np.float32] | None = None,
    item_genres: NDArray[np.bool_] | None = None,
    calibration: tuple[float, float] | None = None,
    candidates: CandidateRecall | None = None,
) -> Report:
    """Report on an evaluation of `split`.

    `text_vectors (items, t)` and `item_genres (items, g)` are for what lists are like, `calibration` (scale, offset) is that
    of the row `judged`. KeyError if there is no such row.
    """
    requests = split.queries.take(split.queries.requests()[0])
    beyond = {
        row.name: beyond_accuracy(row.lists, requests, split.train, text_vectors=text_vectors, item_genres=item_genres)
        for row in evaluation.rows
        if row.lists is not None
    }
    own = evaluation.row(judged)
    told = None
    if calibration is not None and own.lists is not None and own.scores is not None:
        told = pick_reliability(own.lists, own.scores, split.queries, calibration)
    return Report(
        evaluation,
        judged,
        {row.name: evaluation.gain(judged, row.name) for row in evaluation.rows if row.name != judged},
        {row.name: segments(row.ranks, split) for row in evaluation.rows},
        beyond,
        told,
        candidates,
        segment_table({row.name: row.ranks for row in evaluation.rows}, split),
    )
