"""RecTools' SASRec on the split that rectools_peer prepared; runs inside RecTools' own environment, imports nothing of ours.

python rectools_runner.py <folder>     reads <folder>/task.json and events.npz, writes <folder>/lists.npz and rectools.json
"""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel


def main() -> None:
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text())
    events = np.load(folder / "events.npz")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    seed_everything(task["seed"])
    frame = pd.DataFrame(
        {
            Columns.User: events["user"],
            Columns.Item: events["item"],
            # The order within each person is all that it takes from the time.
            Columns.Datetime: pd.Timestamp("2000-01-01") + pd.to_timedelta(np.arange(len(events["user"])), unit="s"),
            Columns.Weight: 1.0,
        }
    )
    dataset = Dataset.construct(frame)
    epochs = _Epochs()

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=task["epochs"],
            max_time=timedelta(seconds=task["seconds"]),
            accelerator="cpu",
            devices=1,
            callbacks=[epochs],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
        )

    model = SASRecModel(
        n_factors=task["dim"],
        n_blocks=task["layers"],
        n_heads=task["heads"],
        session_max_len=task["history"],
        loss="softmax",
        get_trainer_func=trainer,
        recommend_torch_device="cpu",
    )
    began = time.perf_counter()
    model.fit(dataset)
    seconds = time.perf_counter() - began
    users = events["asked"]
    answer = model.recommend(users=users, dataset=dataset, k=task["k"], filter_viewed=True)
    lists = np.full((len(users), task["k"]), -1, np.int64)
    row = pd.Series(np.arange(len(users)), index=users)
    lists[row[answer[Columns.User]].to_numpy(), answer[Columns.Rank].to_numpy() - 1] = answer[Columns.Item].to_numpy()
    np.savez(folder / "lists.npz", lists=lists)
    found = {"train_seconds": seconds, "epochs": epochs.done, "torch_threads": torch.get_num_threads()}
    (folder / "rectools.json").write_text(json.dumps(found))


class _Epochs(Callback):
    """Counts finished epochs and tells of them; the trainer that is given is copied, so it counts on its class."""

    done = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _Epochs.done += 1
        loss = float(trainer.callback_metrics.get("train_loss", float("nan")))
        print(f"  RecTools epoch {_Epochs.done}: loss {loss:.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
