"""The ranker's invariants: causality, independent candidates, invisible padding, a correction that starts at zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from orchestration.compute.export import export_fp32, random_inputs, session_runner
from orchestration.compute.model import ItemTower, Ranker, RankerShape
from schemas.ranker import TEXT_DIM

F, G, D = 3, 4, 64


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    torch.manual_seed(0)
    ranker = Ranker(RankerShape(context_features=F, candidate_features=G)).eval()
    for name, parameter in ranker.named_parameters():
        if not name.startswith("correction."):
            # Away from the gentle start: biases and null vectors that are zero would hide a mistake.
            torch.nn.init.normal_(parameter, std=0.1)
    return ranker


@pytest.fixture(scope="module")
def trained(ranker: Ranker) -> Ranker:
    """The same ranker with a correction that is not zero any more."""
    other = Ranker(ranker.shape).eval()
    other.load_state_dict(ranker.state_dict())
    torch.nn.init.normal_(other.correction.weight)
    return other


def run(ranker: Ranker, inputs: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    with torch.no_grad():
        user, scores = ranker(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return user.numpy(), scores.numpy()


def inputs(b: int = 3, h: int = 6, n: int = 5) -> dict[str, NDArray[Any]]:
    return random_inputs(b, h, n, f=F, g=G, d=D, seed=1)


def prefix_states(ranker: Ranker, given: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    mask = tensors.pop("history_mask")
    with torch.no_grad():
        tokens = ranker.prefix(**{k: v for k, v in tensors.items() if not k.startswith("candidate")})
        return ranker.encode(tokens, None, ranker.biases(mask))[0].numpy()


def test_a_later_event_leaves_earlier_states_alone(ranker: Ranker) -> None:
    before = inputs()
    after = {name: value.copy() for name, value in before.items()}
    after["history_vectors"][0, 4] *= -1
    after["history_kinds"][0, 4] = 1 + after["history_kinds"][0, 4] % 6
    one, two = prefix_states(ranker, before), prefix_states(ranker, after)
    changed = 2 + 4
    np.testing.assert_allclose(one[0, :changed], two[0, :changed], atol=1e-6)
    assert np.abs(one[0, changed:] - two[0, changed:]).max() > 1e-3


def test_a_candidate_does_not_see_the_others(trained: Ranker) -> None:
    given = inputs(n=9)
    _, together = run(trained, given)
    order = np.random.default_rng(0).permutation(9)
    candidate = [name for name in given if name.startswith("candidate")]
    _, permuted = run(trained, given | {name: given[name][:, order] for name in candidate})
    np.testing.assert_allclose(permuted, together[:, order], atol=1e-5)
    _, alone = run(trained, given | {name: given[name][:, 3:4] for name in candidate})
    np.testing.assert_allclose(alone, together[:, 3:4], atol=1e-5)


def test_the_score_starts_as_the_retriever_and_the_trend(ranker: Ranker) -> None:
    given = inputs()
    user, scores = run(ranker, given)
    np.testing.assert_allclose(np.linalg.norm(user, axis=1), 1, atol=1e-5)
    retrieval = np.einsum("bd,bnd->bn", user, given["candidate_vectors"]) / ranker.shape.temperature
    features = (torch.from_numpy(given[name]) for name in ("candidate_features", "candidate_mask"))
    with torch.no_grad():
        trend = ranker.trend(ranker.candidate_features.standardise(*features)).squeeze(-1).numpy()
    assert np.abs(trend).max() > 0.01
    np.testing.assert_allclose(scores, retrieval + trend, atol=1e-4)


def test_the_retriever_starts_near_what_the_person_had() -> None:
    torch.manual_seed(0)
    new = Ranker(RankerShape("small", 1, 1)).eval()
    d = new.user.out_features
    vectors = np.random.default_rng(0).standard_normal((50, d)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for last in range(5):
        events = new.event_tokens(
            *(
                torch.from_numpy(part)
                for part in (
                    vectors[None, last : last + 1],
                    np.ones((1, 1), np.int64),
                    np.zeros((1, 1), np.float32),
                    np.ones((1, 1), np.float32),
                )
            )
        )
        with torch.no_grad():
            user = new.user_vectors(new.encode(events, None, (torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)))[0])[
                0, 0
            ]
        assert int((vectors @ user.numpy()).argmax()) == last


def test_padding_changes_nothing(trained: Ranker) -> None:
    given = inputs()
    padded = {
        name: np.concatenate([np.zeros_like(value), value], axis=1) if name.startswith("history") else value
        for name, value in given.items()
    }
    for one, two in zip(run(trained, given), run(trained, padded), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


def test_a_ranker_without_gaps_takes_the_same_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    timeless = Ranker(RankerShape(context_features=F, candidate_features=G, gaps=False)).eval()
    export_fp32(timeless, tmp_path / "ranker.onnx", f=F, g=G, d=D)
    given = inputs()
    answer = session_runner(tmp_path / "ranker.onnx")  # feeds every input by name
    later = given | {"history_gaps": given["history_gaps"] * 1000 + 7}
    for one, two, three in zip(answer(given), answer(later), run(timeless, given), strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, three, atol=1e-4)


def test_without_history_the_wish_speaks(trained: Ranker) -> None:
    given = inputs(h=1)
    for name in ("history_vectors", "history_kinds", "history_values", "history_gaps", "history_mask"):
        given[name] = np.zeros_like(given[name])
    given["prompt_vector"] = given["candidate_vectors"][:, 0]
    given["prompt_mask"] = np.ones(3, np.float32)
    user, scores = run(trained, given)
    assert np.isfinite(scores).all()
    other, _ = run(trained, given | {"prompt_vector": given["candidate_vectors"][:, 1]})
    assert np.abs(user - other).max() > 1e-3


def test_a_masked_feature_or_wish_is_not_seen(trained: Ranker) -> None:
    given = inputs()
    for values, mask in (("context_features", "context_mask"), ("candidate_features", "candidate_mask")):
        wild = given | {values: np.where(given[mask] > 0, given[values], np.float32(1e6))}
        np.testing.assert_allclose(run(trained, wild)[1], run(trained, given)[1], atol=1e-5)
    unwanted = given | {"prompt_mask": np.zeros(3, np.float32)}
    other = unwanted | {"prompt_vector": -given["prompt_vector"]}
    np.testing.assert_allclose(run(trained, unwanted)[1], run(trained, other)[1], atol=1e-5)


def test_whitening_folds_into_one_affine_map() -> None:
    torch.manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(50, TEXT_DIM) + 0.5, dim=-1)
    tower = ItemTower(texts, D, torch.arange(50) < 40)
    vectors, text_only = tower()
    torch.testing.assert_close(tower.project_text(texts), text_only, atol=1e-4, rtol=0)
    assert not torch.allclose(vectors[:40], text_only[:40], atol=1e-4)
    torch.testing.assert_close(vectors[40:], text_only[40:])
