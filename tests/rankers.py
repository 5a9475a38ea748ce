"""Rankers for tests and benchmarks that train none."""

from __future__ import annotations

import torch

from orchestration.compute.model import Ranker, RankerShape


def random_ranker(size: str, f: int, g: int, seed: int = 0) -> Ranker:
    """A ranker with seeded weights in which every path is live: fresh ones start with silent heads."""
    torch.manual_seed(seed)
    ranker = Ranker(RankerShape(size, f, g)).eval()
    with torch.no_grad():
        for parameter in ranker.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return ranker
