"""Several processes train one model; one alone is not changed by it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from orchestration.compute.devices import Devices

ROOT = Path(__file__).parents[3]
WORKER = """
import sys, numpy as np, torch
from pathlib import Path
from tests.orchestration.compute.test_train import QUICK, Features, texts, wishes, world
from orchestration.compute.train import train
torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), sys.argv[2]
lines = []
trained = train(world(), texts(), QUICK, features=Features(), wishes=wishes(), device="cpu",
                checkpoint=folder / "ranker.ckpt", on_progress=lines.append)
user, scores = trained.item_vectors(), trained.ranker.user.weight.detach().numpy()
np.savez(folder / f"{rank}.npz", user=user, scores=scores, calibration=trained.calibration, lines=len(lines))
"""


def test_shares_are_even_and_leave_no_batch_out() -> None:
    one = Devices("cpu")
    assert one.share([1, 2, 3]) == [1, 2, 3]
    shares = []
    for rank in range(2):
        one.count, one.rank = 2, rank
        shares.append(one.share([1, 2, 3]))
    assert shares == [[1, 3], [2, 1]]
    assert one.share([]) == []


def test_one_process_alone_keeps_its_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.arange(3.0)
    Devices("cpu").average_gradients([weight])
    assert weight.grad.tolist() == [0, 1, 2]


def test_two_processes_end_with_the_same_weights(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(tmp_path), str(rank)],
            cwd=ROOT,
            env=os.environ
            | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors[-3000:]
    one, two = (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
    for name in ("user", "scores", "calibration"):
        np.testing.assert_array_equal(one[name], two[name])
    assert (int(one["lines"]), int(two["lines"])) == (3, 0)
    assert (tmp_path / "ranker.ckpt").is_file()
