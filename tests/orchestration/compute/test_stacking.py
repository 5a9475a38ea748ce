"""Weights are found where choices were made by them, and stay where a few choices say nothing of them."""

from __future__ import annotations

import numpy as np
import torch

from orchestration.compute.stacking import LEAST_TRUST, popularity_weights, stack

TRUTH = torch.tensor([0.4, 1.2, -0.7])  # of the similarity, then of the features


def slates(labels: int, truth: torch.Tensor = TRUTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity `(l, 8)` and features `(l, 8, 2)` of slates whose first candidate was chosen by `truth`."""
    generator = torch.Generator().manual_seed(1)
    known = torch.randn(labels, 8, 3, generator=generator)
    uniform = torch.rand(labels, 8, generator=generator).clamp_min(1e-9)
    chosen = (known @ truth - (-uniform.log()).log()).argmax(1)  # Gumbel noise: a multinomial logit
    here = torch.arange(labels)
    first = known[here, 0].clone()
    known[here, 0] = known[here, chosen]
    swapped = chosen > 0
    known[here[swapped], chosen[swapped]] = first[swapped]
    return known[..., 0], known[..., 1:]


def test_trust_and_weights_are_found_where_people_chose_by_them() -> None:
    similarity, features = slates(6000)
    found = stack(similarity, features, torch.zeros_like(similarity), torch.zeros(2))
    np.testing.assert_allclose(found.numpy(), TRUTH.numpy(), atol=0.06)


def test_a_candidate_that_was_sure_to_be_drawn_counts_as_that() -> None:
    """A second copy of every negative, each half as much of one, changes nothing."""
    similarity, features = slates(2000)
    once = stack(similarity, features, torch.zeros_like(similarity), torch.zeros(2))
    copied = torch.cat([similarity, similarity[:, 1:]], 1), torch.cat([features, features[:, 1:]], 1)
    correction = torch.full_like(copied[0], float(np.log(2)))
    correction[:, 0] = 0
    np.testing.assert_allclose(stack(*copied, correction, torch.zeros(2)).numpy(), once.numpy(), atol=1e-4)


def test_few_labels_move_little_and_none_nothing() -> None:
    similarity, features = slates(6000)
    before = torch.tensor([0.3, 0.3])

    def moved(labels: int) -> float:
        found = stack(similarity[:labels], features[:labels], torch.zeros(labels, 8), before)
        return float((found - torch.cat([torch.ones(1), before])).norm())

    assert moved(0) == 0
    assert 0 < moved(3) < 0.5 * moved(6000)


def test_a_retriever_that_knows_nothing_keeps_a_say() -> None:
    similarity, features = slates(3000, torch.tensor([-0.5, 1.0, 0.0]))
    assert float(stack(similarity, features, torch.zeros_like(similarity), torch.zeros(2))[0]) == np.float32(
        LEAST_TRUST
    )


def test_popularity_weights_are_those_people_chose_by() -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(30, 50, 2, generator=generator)
    absent = torch.zeros(30, 50, dtype=torch.bool)
    absent[:, :5] = True
    share = torch.softmax((features @ torch.tensor([0.9, -0.5])).masked_fill(absent, -1e4), -1)
    chosen = torch.from_numpy(
        np.random.default_rng(3).multinomial(500, share.double().numpy() / share.double().sum(1, keepdim=True).numpy())
    )
    found = popularity_weights(features, absent, chosen, torch.zeros(2))
    np.testing.assert_allclose(found.numpy(), [0.9, -0.5], atol=0.03)
    assert popularity_weights(features, absent, torch.zeros_like(chosen), torch.ones(2)).tolist() == [1, 1]
