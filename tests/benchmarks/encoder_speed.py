"""How fast the exported text encoder is beside sentence-transformers: items in float, wishes in int8, in the same run.

The answers are compared before anything is timed: the cosine to the original, and how many of a text's ten nearest stay
the same in int8. Both sides get the same texts and threads, and each its own way of batching by length; wishes come one
by one, as they do when somebody waits. Run by itself: `python -m tests.benchmarks.encoder_speed`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import orchestration  # first: it sets how OpenMP waits
from inference.encoder import TextEncoder
from orchestration.compute.encoder import export_encoder, original_encoder
from orchestration.sources.open import open_source
from schemas.events import Item

assert orchestration is not None
FP32_COSINE, INT8_COSINE, OVERLAP = 0.9999, 0.99, 0.80
NEAREST = 10
# Said as people say it; the length of a wish decides what its encoding costs.
WISHES: tuple[str, ...] = (
    "slow-burn space sci-fi",
    "something funny for a rainy Sunday with the children",
    "a detective story without much blood",
    "old westerns with good music",
    "I loved Alien and The Thing; more like those, but newer",
    "French romance, not too sad",
    "jazz",
    "a true story about a courtroom",
    "animation for grown-ups",
    "war film from the other side's view",
    "documentary on deep-sea creatures",
    "zombie comedy",
    "quiet drama, one room, few people",
    "heist with a clever twist at the end",
    "nothing scary, happy ending, short",
    "boxing",
)


def encoding(
    texts: Sequence[str], *, wishes: Sequence[str] = WISHES, threads: int | None = None, rounds: int = 5
) -> dict[str, Any]:
    """Speed-ups over sentence-transformers on `texts` (items) and `wishes`, and how close the answers are.

    Times are medians over `rounds`; in each, both sides encode all of it. Raises SystemExit if an answer is not close
    enough to be worth timing.
    """
    threads = threads or os.cpu_count() or 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "encoder"
            export_encoder(place)
            fp32 = TextEncoder(place, threads=threads, precision="fp32")
            int8 = TextEncoder(place, threads=threads, precision="int8")
        original = original_encoder()

        def ask(some: Sequence[str]) -> NDArray[np.float32]:
            return np.asarray(
                original.encode(list(some), batch_size=32, normalize_embeddings=True, show_progress_bar=False)
            )

        report: dict[str, Any] = {"texts": len(texts), "wishes": len(wishes), "threads": threads}
        report |= _checked(fp32, int8, ask, texts, wishes)
        items = _rounds({"ours": lambda: fp32.encode(texts), "theirs": lambda: ask(texts)}, rounds)
        # Not encode_one: it remembers, and a remembered wish costs nothing.
        one_by_one = _rounds(
            {
                "ours": lambda: [int8.encode([wish]) for wish in wishes],
                "theirs": lambda: [ask([wish]) for wish in wishes],
            },
            2 * rounds,
        )
    finally:
        torch.set_num_threads(before)
    return report | {
        "encode_items_speedup": round(items["theirs"] / items["ours"], 3),
        "encode_items_per_s": round(len(texts) / items["ours"], 1),
        "encode_wish_speedup": round(one_by_one["theirs"] / one_by_one["ours"], 3),
        "encode_wish_p50_ms": round(one_by_one["ours"] / len(wishes) * 1000, 3),
    }


def _checked(
    fp32: TextEncoder,
    int8: TextEncoder,
    ask: Callable[[Sequence[str]], NDArray[np.float32]],
    texts: Sequence[str],
    wishes: Sequence[str],
) -> dict[str, float]:
    exact, items, asked = ask(texts), fp32.encode(texts), [*wishes, *texts]
    wish_exact = np.concatenate([ask(wishes), exact])
    wish = int8.encode(asked)
    cosine = float((items * exact).sum(axis=1).min())
    wish_cosine = float((wish * wish_exact).sum(axis=1).mean())
    overlap = float(
        np.mean(
            [
                len(set(ours) & set(theirs)) / len(theirs)
                for ours, theirs in zip(_nearest(wish, items), _nearest(wish_exact, exact), strict=True)
            ]
        )
    )
    for name, value, least in (
        ("an item's cosine to sentence-transformers", cosine, FP32_COSINE),
        ("a wish's mean cosine to sentence-transformers", wish_cosine, INT8_COSINE),
        (f"the overlap of the {NEAREST} nearest", overlap, OVERLAP),
    ):
        if not value >= least:
            raise SystemExit(f"{name} is {value:.4f}, below {least}: nothing to time")
    return {
        "encode_items_cosine": round(cosine, 6),
        "encode_wish_cosine": round(wish_cosine, 5),
        "encode_wish_cosine_of_wishes": round(float((wish * wish_exact)[: len(wishes)].sum(axis=1).mean()), 5),
        "neighbours_overlap": round(overlap, 4),
    }


def _nearest(asked: NDArray[np.float32], items: NDArray[np.float32]) -> list[list[int]]:
    order: list[list[int]] = np.argsort(-(asked @ items.T), axis=1, kind="stable")[:, :NEAREST].tolist()
    return order


def _rounds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call; all of them in every round, the first round to warm up."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for number in range(1 + rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:
                took[name].append(time.perf_counter() - began)
    return {name: float(np.median(seconds)) for name, seconds in took.items()}


def catalogue(count: int) -> list[str]:
    """Texts of the simulated catalogue's first items."""
    source = open_source(None, start=date(2026, 1, 1), until=datetime(2026, 3, 1, tzinfo=UTC))
    items = islice((item for item in source.items() if isinstance(item, Item)), count)
    return [f"{item.title}. {', '.join(item.categories)}. {item.description}" for item in items]


if __name__ == "__main__":
    print(json.dumps(encoding(catalogue(500))))
    sys.exit(0)
