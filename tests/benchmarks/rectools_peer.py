"""RecTools' SASRec beside ours: its own virtual environment, the same split, the same time to train.

Width, layers, heads and longest history are those of our size, the loss is its softmax over all items, everything else its
default. It gives lists of the best 50 for each person; the figures are made from them by our evaluation.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from orchestration.compute.evaluate import CUTOFFS, Row, summarise
from orchestration.compute.splits import Split
from schemas.ranker import MAX_HISTORY, SIZES
from tests.benchmarks.frame import environment

ENVIRONMENT = Path(__file__).parents[2] / "build" / "bench-rectools-0.19.0"
"""Below build/, which git ignores; delete it to have it made again."""
# torch goes first and alone, as in our own environment: nothing after it pulls another build.
STEPS = (["torch==2.13.0"], ["rectools[torch]==0.19.0"])
NAME = "RecTools SASRec"
EPOCHS_MAX = 1000
"""The time ends it, never this."""


def measure(
    split: Split, size: str, seconds: float, seed: int, folder: Path, say: Callable[[str], None]
) -> tuple[Row, dict[str, float]]:
    """Its row on `split` after `seconds` of training, and how the training went."""
    python = environment(ENVIRONMENT, STEPS, say)
    folder.mkdir(parents=True, exist_ok=True)
    shape = SIZES[size]
    task = {**asdict(shape), "history": MAX_HISTORY, "seconds": seconds, "seed": seed, "k": max(CUTOFFS)}
    (folder / "task.json").write_text(json.dumps({**task, "epochs": EPOCHS_MAX}))
    asked = split.queries.user
    np.savez(folder / "events.npz", user=split.train.user, item=split.train.item, asked=asked)
    say(f"training {NAME} for {seconds:.0f} s")
    runner = Path(__file__).with_name("rectools_runner.py")
    subprocess.run([str(python), "-W", "ignore", str(runner), str(folder)], check=True, stdout=sys.stderr)
    lists = np.load(folder / "lists.npz")["lists"]  # (q, k) items, −1 where it had no more to give
    found = lists == split.queries.target[:, None]
    # What is not among the listed ranks behind every cut-off.
    rank = np.where(found.any(1), found.argmax(1) + 1, len(split.train.item_ids) + 1).astype(np.int64)
    went: dict[str, float] = json.loads((folder / "rectools.json").read_text())
    return summarise(NAME, rank, split.queries.user), went
