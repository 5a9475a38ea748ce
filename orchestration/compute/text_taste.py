"""A recommender that knows items by their texts alone: small enough to be learned anew for every prompt template.

    u = normalise(Σ e^age · v(last events) + e^wish · w(wish)),   score = ⟨u, v⟩

v and w are the ranker's item tower without ids: what it makes of a text here is what it will make of a new item there.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from orchestration.compute.interactions import Interactions
from orchestration.compute.model import ItemTower
from orchestration.compute.splits import Queries
from orchestration.compute.wishes import Wishes
from schemas.ranker import SIZES

LAST = 20
"""Events of a person that are looked at."""
TEMPERATURE = 0.05
BATCH = 512
NEGATIVES = 4_096
"""Items that a batch is told apart from; all of them in a smaller catalogue."""
LABELS = 40_000
"""Of an epoch at most, by seed."""
WISH_RATE = 0.25
LEARNING_RATE = 6e-3


class TextTaste(nn.Module):
    """Text vectors `(items, 384)` in, scores of people with their last events and a wish out."""

    def __init__(self, text_vectors: NDArray[np.float32]) -> None:
        super().__init__()
        none = torch.zeros(len(text_vectors), dtype=torch.bool)
        self.tower = ItemTower(torch.from_numpy(text_vectors), SIZES["small"].dim, none)
        self.tower.residual.requires_grad_(False)
        self.age = nn.Parameter(torch.linspace(-2.0, 0.0, LAST))  # the newest counts most; learned from there
        self.wish = nn.Parameter(torch.zeros(()))

    def users(self, vectors: Tensor, history: Tensor, wish: Tensor, has_wish: Tensor) -> Tensor:
        """`(b, d)` from item vectors, `history (b, LAST)` (−1 pads), wishes `(b, 384)` and who has one `(b,)`."""
        real = (history >= 0).to(vectors.dtype)  # (b, LAST)
        held = functional.embedding(history.clamp_min(0), vectors)  # (b, LAST, d)
        taste = (held * (real * self.age.exp()).unsqueeze(-1)).sum(1)
        asked = self.tower.project_text(wish) * (has_wish * self.wish.exp()).unsqueeze(-1)
        return functional.normalize(taste + asked, dim=-1)

    def score(self, history: NDArray[np.int64], wish: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """`(b, items)` for `history (b, LAST)`; a wish `(b, 384)` is given to all or to nobody."""
        b = len(history)
        with torch.no_grad():
            vectors = self.tower.text_only()
            given = torch.zeros(b, self.tower.text.shape[1]) if wish is None else torch.from_numpy(wish)
            users = self.users(vectors, torch.from_numpy(history), given, torch.full((b,), float(wish is not None)))
            return (users @ vectors.T).numpy()


def histories_of(queries: Queries, known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """`(q, LAST)` the last `known (items,)` items before each label, oldest first; −1 pads on the left."""
    rows = np.full((len(queries), LAST), -1, np.int64)
    for place, items in enumerate(queries.histories()):
        if len(last := items[known[items]][-LAST:]):
            rows[place, -len(last) :] = last
    return rows


def learn_taste(
    text_vectors: NDArray[np.float32],
    events: Interactions,
    known: NDArray[np.bool_],
    wishes: Wishes,
    *,
    epochs: int = 3,
    seed: int = 0,
) -> TextTaste:
    """Learn from `events`, all of items that are `known (items,)`: next items, some with a wish that fits them."""
    generator = np.random.default_rng((seed, 8))
    n, start = len(events), events.offsets()[events.user]
    row = np.arange(n)[:, None] - LAST + np.arange(LAST)  # (n, LAST)
    history = np.where(row >= start[:, None], events.item[np.maximum(row, 0)], -1).astype(np.int64)
    pool = np.flatnonzero(known)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        taste = TextTaste(text_vectors)
        steps = epochs * -(-min(n, LABELS) // BATCH)
        optimizer = torch.optim.AdamW([p for p in taste.parameters() if p.requires_grad], lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=max(steps, 1))
        for _ in range(epochs):
            order = generator.permutation(n)[:LABELS]
            for begin in range(0, len(order), BATCH):
                labels = order[begin : begin + BATCH]
                target = events.item[labels]
                texts, meant = wishes.draw(target, generator)
                has_wish = meant.any(1) & (generator.random(len(labels)) < WISH_RATE)
                others = pool if len(pool) <= NEGATIVES else np.sort(generator.choice(pool, NEGATIVES, replace=False))
                shown = np.union1d(others, target)
                vectors = taste.tower.text_only()
                users = taste.users(
                    vectors,
                    torch.from_numpy(history[labels]),
                    torch.from_numpy(texts),
                    torch.from_numpy(has_wish.astype(np.float32)),
                )
                logits = users @ vectors[torch.from_numpy(shown)].T / TEMPERATURE
                loss = functional.cross_entropy(logits, torch.from_numpy(np.searchsorted(shown, target)))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
                schedule.step()
    return taste.eval()
