"""The ranker at work: one verified artefact, one ONNX session, numpy in and numpy out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from inference.artifacts import verify
from inference.telemetry import span
from schemas.errors import ArtifactError
from schemas.manifest import RANKER_FP32, RANKER_INT8, TEXT_PROJECTION
from schemas.ranker import INPUTS, OUTPUTS
from schemas.views import candidate_features, context_features, fingerprint


class Ranker:
    """Scores candidates for one request at a time; safe to share between threads.

    `precision` asks for a file, `int8` or `fp32`; an artefact whose int8 did not pass its gate has fp32 alone, and
    `self.precision` says so. Raises ArtifactError if the artefact was changed, expects other features than this code
    assembles, or has another signature.
    """

    def __init__(self, folder: Path, *, version: str | None = None, precision: str = "int8", threads: int = 0) -> None:
        self.manifest = verify(folder)
        self.version = self.manifest.version
        if version is not None and version != self.version:
            raise ArtifactError(f"{folder} holds version {self.version}, not {version}; release again")
        ours = (context_features(), candidate_features(), fingerprint())
        theirs = (self.manifest.context_features, self.manifest.candidate_features, self.manifest.feature_fingerprint)
        if ours != theirs:
            raise ArtifactError(
                f"model {self.version} learned features {self.manifest.feature_fingerprint}, this code assembles {ours[2]}"
                f"{_first_difference(theirs[0] + theirs[1], ours[0] + ours[1])}; train again after changing schemas/views.py"
            )
        self.folder = folder
        self.dim = self.manifest.dim
        self.precision = precision if RANKER_INT8 in self.manifest.files else "fp32"
        self._session = _session(folder / (RANKER_INT8 if self.precision == "int8" else RANKER_FP32), threads)
        self.provider = self._session.get_providers()[0]
        with np.load(folder / TEXT_PROJECTION, allow_pickle=False) as arrays:
            self._weight = arrays["weight"].astype(np.float32)
            self._bias = arrays["bias"].astype(np.float32)

    def project(self, text_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Texts `(n, 384)` in item space `(n, dim)`, normalised."""
        projected = text_vectors @ self._weight.T + self._bias
        norm = np.linalg.norm(projected, axis=-1, keepdims=True)
        return np.asarray(projected / np.maximum(norm, 1e-12), np.float32)

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`user_vector (b, d)` and `scores (b, n)` for the inputs described in schemas/ranker.py."""
        attributes = {
            "recsys.model.version": self.version,
            "recsys.model.provider": self.provider,
            "recsys.precision": self.precision,
            "recsys.rank.rows": int(inputs["candidate_vectors"].shape[1]),
        }
        with span("rank", attributes=attributes):
            user_vector, scores = self._session.run(list(OUTPUTS), {name: inputs[name] for name in INPUTS})
        return user_vector, scores


def _first_difference(theirs: tuple[str, ...], ours: tuple[str, ...]) -> str:
    """Where two orders of features part, in words; nothing where they do not."""
    for place, (its, own) in enumerate(zip_longest(theirs, ours)):
        if its != own:
            return f": at place {place + 1} it has {its!r} where this code has {own!r}"
    return ""


def _session(file: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Spinning threads would burn the processor that other requests, and the database beside us, need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = {entry.name for entry in session.get_inputs()}, {entry.name for entry in session.get_outputs()}
    if names != (set(INPUTS), set(OUTPUTS)):
        raise ArtifactError(f"{file} has inputs {sorted(names[0])} and outputs {sorted(names[1])}; export it again")
    return session
