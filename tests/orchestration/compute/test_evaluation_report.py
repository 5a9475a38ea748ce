"""A report says of every row what is known of it, in words and as JSON, and scores nothing again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from orchestration.compute.candidate_recall import candidate_recall, sources_of
from orchestration.compute.evaluate import Evaluation, evaluate, score_popularity
from orchestration.compute.evaluation_report import report
from orchestration.compute.interactions import Interactions
from orchestration.compute.segments import segments
from orchestration.compute.splits import Split, time_split

ITEMS = 50


@pytest.fixture(scope="module")
def split() -> Split:
    generator = np.random.default_rng(0)
    n = 1200
    user = np.sort(generator.integers(0, 60, n))
    at = generator.integers(0, 10**6, n) * 10**6
    order = np.lexsort((at, user))
    return time_split(
        Interactions(
            np.array([f"u{number:02}" for number in range(60)]),
            np.array([f"i{number:02}" for number in range(ITEMS)]),
            user.astype(np.int32),
            generator.integers(0, ITEMS, n).astype(np.int32),
            at[order],
            np.ones(n, np.int64),
            np.full(n, np.nan, np.float32),
        )
    )


@pytest.fixture(scope="module")
def evaluation(split: Split) -> Evaluation:
    floor, ranker = (np.random.default_rng(seed).random(ITEMS).astype(np.float32) for seed in (0, 1))
    return evaluate({"floor": score_popularity(floor), "ranker": score_popularity(ranker)}, split)


def test_a_report_is_json_and_words(split: Split, evaluation: Evaluation) -> None:
    made = report(
        evaluation,
        split,
        "ranker",
        text_vectors=np.random.default_rng(0).standard_normal((ITEMS, 8)).astype(np.float32),
        item_genres=np.random.default_rng(1).random((ITEMS, 4)) < 0.4,
        calibration=(1.0, -3.0),
        candidates=candidate_recall(split, sources_of(split), limit=20),
    )
    written = json.loads(json.dumps(made.to_dict()))
    assert [row["name"] for row in written["rows"]] == ["floor", "ranker"]
    assert set(written["gains"]) == {"floor"}
    assert written["segments"]["ranker"][0]["ndcg"] == pytest.approx(evaluation.row("ranker").ndcg[10])
    assert written["beyond_accuracy"]["floor"]["coverage_rate"] > 0
    assert 0 < written["reliability"]["mean_probability"] < 0.2
    assert written["candidates"]["union"] > 0
    text = made.tables()
    for words in ("NDCG@10 gained over", "tail", "coverage rate", "calibration error", "union"):
        assert words in text


def test_what_is_not_given_is_not_reported(split: Split, evaluation: Evaluation) -> None:
    made = report(evaluation, split, "ranker")
    assert made.reliability is None
    assert made.candidates is None
    assert "calibration error" not in made.tables()
    with pytest.raises(KeyError, match="known: floor, ranker"):
        report(evaluation, split, "another")


def test_segments_of_a_report_are_those_of_the_split(split: Split, evaluation: Evaluation) -> None:
    made = report(evaluation, split, "ranker")
    assert made.segments["floor"] == segments(evaluation.row("floor").ranks, split)
