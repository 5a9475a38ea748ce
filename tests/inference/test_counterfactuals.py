"""Counterfactuals: the batch answers as the ranker would if it were asked again without the thing."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from inference import counterfactuals
from inference.counterfactuals import Changes
from inference.live import Columns
from inference.ranker import CpuEngine
from inference.ranker_inputs import person_inputs
from inference.store import History, PersonRow
from orchestration.compute.export import export_fp32
from orchestration.compute.folded import fold
from schemas.ranker import SIZES
from schemas.views import CANDIDATE_VIEWS, CONTEXT_VIEWS, CROSS_VIEWS, candidate_features, context_features
from tests.rankers import random_ranker

AT = datetime(2026, 5, 1, tzinfo=UTC)
F, G, D = len(context_features()), len(candidate_features()), SIZES["small"].dim
N = 6


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> CpuEngine:
    file = tmp_path_factory.mktemp("graph") / "ranker.onnx"
    export_fp32(fold(random_ranker("small", F, G)), file, f=F, g=G, d=D)
    return CpuEngine(Path(file), 1)


def history(items: str, without: str = "") -> History:
    """One event per letter, an hour apart, a vector per letter; `-` has none. Those of `without` never happened."""
    rows = [row for row, name in enumerate(items) if name not in without]
    vectors = {name: np.random.default_rng(ord(name)).standard_normal(D).astype(np.float32) for name in items}
    return History(
        [items[row] for row in rows],
        [f"Title {items[row]}" for row in rows],
        ["rating" if row % 2 else "view" for row in rows],
        [float(row % 5) if row % 2 else None for row in rows],
        np.array([AT.timestamp() - 3600 * (len(items) - row) for row in rows]),
        [
            None if items[row] == "-" else vectors[items[row]] / np.float32(np.linalg.norm(vectors[items[row]]))
            for row in rows
        ],
    )


def inputs_of(past: History, wish: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """A request's inputs with that history, features that are all known and N candidates."""
    nothing = {view.name: Columns([], {}, np.zeros(0), False) for view in (*CONTEXT_VIEWS, *CROSS_VIEWS)}
    made = person_inputs(PersonRow(None, past, nothing), AT, wish, D)
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((1, N, D)).astype(np.float32)
    made["context_features"], made["context_mask"] = (
        rng.standard_normal((1, F)).astype(np.float32),
        np.ones((1, F), np.float32),
    )
    return made | {
        "candidate_vectors": vectors / np.linalg.norm(vectors, axis=2, keepdims=True),
        "candidate_features": rng.standard_normal((1, N, G)).astype(np.float32),
        "candidate_mask": np.ones((1, N, G), np.float32),
    }


def scores(engine: CpuEngine, changes: Changes, past: History, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return engine.run(counterfactuals.batch(inputs, range(N), changes, past, AT))[1]


def test_an_item_left_out_is_a_history_in_which_it_never_was(engine: CpuEngine) -> None:
    past = history("abca-de")
    found = counterfactuals.past_of(past, D)
    assert found.item_ids == ["e", "d", "a", "c", "b"]
    answers = scores(engine, Changes(found.rows), past, inputs_of(past))
    assert np.allclose(answers[0], engine.run(inputs_of(past))[1][0], atol=1e-4)
    for row, name in enumerate(found.item_ids, start=1):
        again = engine.run(inputs_of(history("abca-de", without=name)))[1][0]
        assert np.allclose(answers[row], again, atol=1e-4), name
        assert not np.allclose(answers[row], answers[0], atol=1e-3), f"leaving out {name} changed nothing"


def test_the_only_item_left_out_is_no_history(engine: CpuEngine) -> None:
    past = history("a")
    answers = scores(engine, Changes(counterfactuals.past_of(past, D).rows), past, inputs_of(past))
    assert np.allclose(answers[1], engine.run(inputs_of(history("a", without="a")))[1][0], atol=1e-4)


def test_a_wish_left_out_is_a_request_without_one_and_a_part_is_another_wish(engine: CpuEngine) -> None:
    past = history("abc")
    wish, other = np.eye(D, dtype=np.float32)[:1], np.eye(D, dtype=np.float32)[1:2]
    answers = scores(engine, Changes(wishes=other, has_wish=True), past, inputs_of(past, wish))
    assert np.allclose(answers[1], engine.run(inputs_of(past))[1][0], atol=1e-4)
    assert np.allclose(answers[2], engine.run(inputs_of(past, other))[1][0], atol=1e-4)


def test_a_view_left_out_is_one_of_which_nothing_is_known(engine: CpuEngine) -> None:
    past = history("abc")
    inputs = inputs_of(past)
    views = counterfactuals.known_views(inputs)
    assert views == [*CONTEXT_VIEWS, *CANDIDATE_VIEWS, *CROSS_VIEWS]
    answers = scores(engine, Changes(views=views), past, inputs)
    item_wide = len(CANDIDATE_VIEWS[0].features)
    for row, (mask, columns) in enumerate(
        (
            ("context_mask", slice(None)),
            ("candidate_mask", slice(0, item_wide)),
            ("candidate_mask", slice(item_wide, None)),
        ),
        start=1,
    ):
        again = {name: value.copy() for name, value in inputs.items()}
        again[mask][..., columns] = 0
        assert np.allclose(answers[row], engine.run(again)[1][0], atol=1e-4)
    blind = {name: np.zeros_like(value) if name.endswith("_mask") else value for name, value in inputs.items()}
    assert counterfactuals.known_views(blind) == []


def test_the_inputs_of_the_request_stay_as_they_are(engine: CpuEngine) -> None:
    past = history("abc")
    inputs = inputs_of(past, np.eye(D, dtype=np.float32)[:1])
    before = {name: value.copy() for name, value in inputs.items()}
    changes = Changes(counterfactuals.past_of(past, D).rows, None, True, counterfactuals.known_views(inputs))
    scores(engine, changes, past, inputs)
    assert all(np.array_equal(before[name], inputs[name]) for name in inputs)


def test_effects_say_how_far_an_item_falls_and_how_much_more_than_others() -> None:
    scored = np.array([[3.0, 2.0, 1.0], [0.5, 2.0, 1.0], [2.0, 1.0, 0.0]], np.float32)
    found = counterfactuals.effects(scored, 2)
    assert found.effect.tolist() == [[2.5, 0.0], [1.0, 1.0]]
    assert found.places.tolist() == [[2, -1], [0, 0]]
    assert np.allclose(found.lead[1], 0)


def test_at_most_so_many_are_tried_the_newest_and_what_is_most_alike_among_them() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, D)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    past = counterfactuals.Past([f"i{n}" for n in range(40)], [[n] for n in range(40)], vectors)
    people = np.zeros((40, 3), np.int64)
    people[30, 2] = 500
    chosen = counterfactuals.preselect(past, vectors[[35, 36, 37]], people)
    assert len(chosen) == counterfactuals.MOST_REMOVALS
    assert {0, 1, 2, 3, 35, 36, 37} <= set(chosen.tolist())
    assert len(counterfactuals.preselect(past, vectors[:0], people[:, :0])) == counterfactuals.NEWEST


@pytest.mark.parametrize(
    ("wish", "parts"),
    [
        ("a funny film", []),
        (
            "a funny film about space, without war",
            [
                ("a funny film", "about space without war"),
                ("about space", "a funny film without war"),
                ("without war", "a funny film about space"),
            ],
        ),
        ("quick and cheap", [("quick", "cheap"), ("cheap", "quick")]),
        ("a, b, c, d, e", []),
        (" , ", []),
    ],
)
def test_a_wish_falls_into_its_clauses(wish: str, parts: list[tuple[str, str]]) -> None:
    assert counterfactuals.clauses(wish) == parts
