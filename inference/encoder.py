"""Text to vector with ONNX Runtime and `tokenizers`: what the sentence encoder needs inside a function.

The float file (`fp32`) makes item vectors, the quantised one (`int8`) the vectors of wishes: a wish
is encoded while somebody waits, an item once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from inference import telemetry
from inference.artifacts import ENCODER_MANIFEST
from inference.cuda import PROVIDER as CUDA_PROVIDER
from inference.onnx_file import check
from schemas.errors import ArtifactError
from schemas.manifest import ArtifactFile
from schemas.ranker import TEXT_DIM

Precision = Literal["fp32", "int8"]

MANIFEST = ENCODER_MANIFEST
TOKENIZER = "tokenizer.json"
ONNX_FILES: dict[Precision, str] = {"fp32": "encoder.fp32.onnx", "int8": "encoder.int8.onnx"}
CACHED_WISHES = 256
# Dynamic quantisation scales activations by the whole batch, so int8 texts run alone: a wish's vector
# must not depend on who asked beside them. Padding makes batches slower than single texts there anyway.
# Float texts run few at a time: what a layer hands on stays in the processor's cache, and hardly anything is padded.
BATCH_TOKENS: dict[Precision, int] = {"fp32": 256, "int8": 1}
CUDA_BATCH_TOKENS = 65_536


@dataclass(frozen=True, slots=True)
class EncoderManifest:
    """What an encoder folder holds, and how close it is to the original torch model.

    `version` names the vector space: it changes with weights, tokeniser, pooling or truncation, and
    not with the machine that exported or the processor that was quantised for.
    """

    name: str
    source: str
    version: str
    dimension: int
    max_tokens: int
    quantised_for: str
    files: dict[str, ArtifactFile]
    fp32_cosine_min: float
    int8_cosine_mean: float
    int8_cosine_min: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    @classmethod
    def read(cls, folder: Path) -> EncoderManifest:
        """The manifest in `folder`. Raises ArtifactError if it is missing or not one of ours."""
        try:
            raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            raw["files"] = {name: ArtifactFile(**entry) for name, entry in raw["files"].items()}
            return cls(**raw)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(
                f"{folder / MANIFEST} is missing or not an encoder's manifest ({error}); export the encoder again"
            ) from error


class TextEncoder:
    """The encoder in `folder`, at work with `threads` threads (0: as many as there are processors). Safe to call from
    several threads.

    With `cuda` it runs on the GPU, in float. Raises ArtifactError if a file is missing, differs from the manifest or has
    another dimension, or if the GPU was asked for and is not what the session got.
    """

    def __init__(self, folder: Path, threads: int = 1, precision: Precision = "fp32", *, cuda: bool = False) -> None:
        if precision not in ONNX_FILES:
            raise ArtifactError(f"there is no encoder of precision {precision!r}; known: {', '.join(ONNX_FILES)}")
        self.manifest = EncoderManifest.read(folder)
        if self.manifest.dimension != TEXT_DIM:
            raise ArtifactError(
                f"the encoder in {folder} makes vectors of {self.manifest.dimension} numbers, not {TEXT_DIM}; "
                "export one whose dimension is TEXT_DIM"
            )
        self.precision = precision
        if cuda and precision != "fp32":
            raise ArtifactError(f"the GPU has no {precision} products that would be faster; ask for fp32 there")
        self._batch_tokens = CUDA_BATCH_TOKENS if cuda else BATCH_TOKENS[precision]
        threads = threads or os.cpu_count() or 1
        # Many texts are shared out, a thread each: within a run threads would wait for each other at every product.
        self._workers = threads if precision == "fp32" and not cuda else 1
        self._tokenizer = Tokenizer.from_str(verified(folder, TOKENIZER, self.manifest).decode("utf-8"))
        # The file brings its own length limit and pads to it; the original model overrides both.
        self._tokenizer.enable_truncation(self.manifest.max_tokens)
        self._tokenizer.no_padding()
        graph = verified(folder, ONNX_FILES[precision], self.manifest)
        check(graph, str(folder / ONNX_FILES[precision]))
        self._session = _session(graph, threads // self._workers, cuda)
        self.provider: str = self._session.get_providers()[0]
        self._inputs = {entry.name for entry in self._session.get_inputs()}
        width = self._session.get_outputs()[0].shape[-1]
        unknown = self._inputs - {"input_ids", "attention_mask", "token_type_ids"}
        if width != TEXT_DIM or unknown:
            raise ArtifactError(
                f"the graph in {folder / ONNX_FILES[precision]} gives {width} numbers per token and takes "
                f"{', '.join(sorted(self._inputs))}; export the encoder again"
            )
        self._cached = lru_cache(maxsize=CACHED_WISHES)(self._encode_wish)

    @property
    def version(self) -> str:
        """The vector space's version, see EncoderManifest."""
        return self.manifest.version

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """`texts` as `(n, 384) float32` unit vectors, in the order given."""
        vectors = np.zeros((len(texts), TEXT_DIM), dtype=np.float32)
        attributes: dict[str, telemetry.Value] = {
            "recsys.rows": len(texts),
            "recsys.encoder_version": self.version,
            "recsys.precision": self.precision,
        }
        with telemetry.span("recsys.encode_text", attributes=attributes):
            tokens = self._tokenizer.encode_batch(list(texts))
            batches = self._batches([len(text.ids) for text in tokens])

            def run(rows: list[int]) -> None:
                vectors[rows] = self._run([tokens[row] for row in rows])

            if self._workers == 1 or len(batches) == 1:
                for rows in batches:
                    run(rows)
            else:
                with ThreadPoolExecutor(self._workers) as pool:
                    list(pool.map(run, batches))
        return vectors

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Rows that are run together, the longest first: as many as fit `_batch_tokens`, each as long as the longest."""
        batches: list[list[int]] = []
        room = 0
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            if not room:
                batches.append([])
                room = max(self._batch_tokens // max(lengths[row], 1), 1)
            batches[-1].append(row)
            room -= 1
        return batches

    def encode_one(self, text: str) -> NDArray[np.float32]:
        """`text` as a `(384,) float32` unit vector, read-only; the last 256 texts are remembered."""
        vector: NDArray[np.float32] = self._cached(text)
        return vector

    def _encode_wish(self, text: str) -> NDArray[np.float32]:
        vector: NDArray[np.float32] = self.encode([text])[0]
        vector.setflags(write=False)
        return vector

    def _run(self, batch: list[Encoding]) -> NDArray[np.float32]:
        """Token states of `batch`, averaged over real tokens and normalised: `(len(batch), 384) float32`."""
        width = max(len(tokens.ids) for tokens in batch)
        ids = np.zeros((len(batch), width), dtype=np.int64)
        mask = np.zeros((len(batch), width), dtype=np.int64)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens.ids)] = tokens.ids
            mask[row, : len(tokens.ids)] = 1
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        outputs = self._session.run(None, {name: feed[name] for name in self._inputs})
        states: NDArray[np.float32] = outputs[0]  # (b, width, 384)
        weights = mask[:, :, None].astype(np.float32)
        mean = (states * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9)
        unit: NDArray[np.float32] = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
        return unit


def verified(folder: Path, name: str, manifest: EncoderManifest) -> bytes:
    """The bytes of `name` in `folder`, exactly as the manifest has them. Raises ArtifactError otherwise."""
    entry = manifest.files.get(name)
    if entry is None:
        raise ArtifactError(f"the manifest in {folder} names no {name}; export the encoder again")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{folder / name} cannot be read ({error}); export the encoder again") from error
    # What is hashed is what is loaded: the file is read once.
    if len(data) != entry.size_bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise ArtifactError(f"{folder / name} is not the file that was exported; export the encoder again")
    return data


def _session(graph: bytes, threads: int, cuda: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Threads wait for each other within a run; once it is over, a spinning one would take the core from the next request.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers: list[Any] = ["CPUExecutionProvider"]
    if cuda:
        ort.preload_dlls(cudnn=False)
        # Half's precision is not enough for what is compared with vectors made on a CPU.
        providers.insert(0, (CUDA_PROVIDER, {"use_tf32": "0"}))
    try:
        session = ort.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # onnxruntime raises its own unrelated types for a malformed graph
        raise ArtifactError(f"ONNX Runtime cannot load the encoder ({error}); export the encoder again") from error
    if cuda and session.get_providers()[0] != CUDA_PROVIDER:
        raise ArtifactError(f"the encoder was to run on the GPU and got {session.get_providers()}")
    return session
