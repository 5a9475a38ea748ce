"""A training's checkpoint: written whole or not at all, continued only by a run of the same data and settings."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def fingerprint(*parts: NDArray[Any] | str | None) -> str:
    """SHA-256 in hex of `parts` in their order; of an array its dtype and shape count, too."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def save(path: Path, run: str, state: dict[str, Any]) -> None:
    """Write `state` of the run with fingerprint `run` beside `path` and rename it: Ctrl-C leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    torch.save({"fingerprint": run, **state}, part)
    os.replace(part, path)


def load(path: Path, run: str) -> dict[str, Any] | None:
    """The state at `path` with its tensors on the CPU; None without one of the run with fingerprint `run`."""
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state if state["fingerprint"] == run else None
