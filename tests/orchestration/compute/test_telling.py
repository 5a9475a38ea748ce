"""Words about long work: enough to see that it goes on, not one for each step."""

from __future__ import annotations

import numpy as np
import pytest
from test_train import QUICK, Features, texts, wishes, world

from orchestration.compute import telling
from orchestration.compute.telling import now_and_then
from orchestration.compute.train import train


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(telling.time, "monotonic", lambda: now[0])
    return now


def test_a_loop_is_told_of_now_and_then(clock: list[float]) -> None:
    said: list[str] = []
    tell = now_and_then(said.append, 15)
    for second in range(60):
        clock[0] = 100.0 + second
        tell(str(second))
    assert said == ["15", "30", "45"]


def test_what_is_quick_is_not_told_of(clock: list[float]) -> None:
    said: list[str] = []
    now_and_then(said.append)("step 1")
    assert said == []


def test_a_training_says_what_it_is_at_within_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestration.compute.train.now_and_then", lambda say: say)
    said: list[str] = []
    trained = train(world(), texts(), QUICK, features=Features(), wishes=wishes(), say=said.append)
    steps = [line for line in said if "epoch 1 of 2: step" in line and line.startswith("stage 1")]
    assert steps[0].startswith("stage 1, epoch 1 of 2: step 1 of ")
    count = len(steps)
    assert steps[-1].startswith(f"stage 1, epoch 1 of 2: step {count} of about {count}, loss ")
    loss = float(steps[-1].rsplit(" ", 1)[1])
    np.testing.assert_allclose(loss, trained.progress[0].loss, atol=1e-3)
    stage_2 = [line for line in said if line.startswith("stage 2")]
    assert stage_2[0].startswith("stage 2: looking for the candidates of ")
    assert "labels' time" in stage_2[1]
    assert stage_2[-1].startswith(f"stage 2, epoch {QUICK.slate_epochs} of {QUICK.slate_epochs}: step ")
