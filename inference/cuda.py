"""A ranker's graph on one NVIDIA GPU: fixed buckets of shapes, each replayed as one CUDA graph.

A request is a few hundred tiny kernels; launched one by one, they would cost more than they compute. So each bucket
is a session of its own with every length fixed, whose kernels are recorded once and replayed together. Requests are
padded to the smallest bucket that holds them: history to the left, candidates to the right, as the contract allows.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from schemas.errors import ArtifactError
from schemas.ranker import OUTPUTS

PROVIDER = "CUDAExecutionProvider"


def device_count() -> int:
    """NVIDIA GPUs that the driver shows and this build of ONNX Runtime could use; asks for nothing and loads no library
    but the driver's own."""
    if PROVIDER not in ort.get_available_providers():
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver, no card
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """At most `b` requests with histories of at most `h` events and at most `n` candidates."""

    b: int
    h: int
    n: int

    def holds(self, inputs: Mapping[str, NDArray[np.generic]]) -> bool:
        b, h = inputs["history_mask"].shape
        return bool(b <= self.b and h <= self.h and inputs["candidate_vectors"].shape[1] <= self.n)

    def padded(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        """`value` of the input `name`, zeros added up to the bucket's shape."""
        shape = [self.b, *value.shape[1:]]
        place = [slice(0, len(value)), *(slice(None) for _ in value.shape[1:])]
        if name.startswith("history_"):
            shape[1], place[1] = self.h, slice(self.h - value.shape[1], None)
        elif name.startswith("candidate_"):
            shape[1], place[1] = self.n, slice(0, value.shape[1])
        if tuple(shape) == value.shape:
            return np.ascontiguousarray(value)
        whole = np.zeros(shape, value.dtype)
        whole[tuple(place)] = value
        return whole


class CudaSession:
    """`file` on the GPU `device`, for the shapes in `buckets`; safe to share between threads, one run at a time.

    Raises ArtifactError if any operator would run anywhere but on the GPU: a silent fall-back costs more than it saves.
    """

    def __init__(
        self,
        file: Path,
        buckets: Sequence[Bucket],
        *,
        device: int = 0,
        addresses: Mapping[str, int] | None = None,
    ) -> None:
        """`addresses` are places on the device, by name, of inputs that the caller fills: contiguous, as wide as the one
        bucket, and kept for as long as the session."""
        if addresses and len(set(buckets)) != 1:
            raise ValueError(f"addresses belong to one bucket, {len(set(buckets))} are given")
        # cuBLAS, cuRAND and the CUDA runtime from their wheels, where they are installed; no cuDNN is needed.
        ort.preload_dlls(cudnn=False)
        self._lock = threading.Lock()
        self._buckets = {bucket: _Bound(file, bucket, device, addresses or {}) for bucket in sorted(set(buckets))}
        self.provider = PROVIDER  # each bucket's session has shown it, or there is no bucket

    def holds(self, inputs: Mapping[str, NDArray[np.generic]]) -> bool:
        """Whether a bucket is wide enough."""
        return any(bucket.holds(inputs) for bucket in self._buckets)

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`user_vector (b, d)` and `scores (b, n)`. Raises ValueError for shapes that no bucket holds."""
        bound = next((bound for bucket, bound in self._buckets.items() if bucket.holds(inputs)), None)
        b, h = inputs["history_mask"].shape
        n = inputs["candidate_vectors"].shape[1]
        if bound is None:
            raise ValueError(f"no bucket holds {b} requests of {h} events and {n} candidates")
        with self._lock:
            bound.feed(inputs)
            user, scores = bound.replay()
        return user[:b], scores[:b, :n]

    def placements(self) -> dict[str, int]:
        """Operators per execution provider, over all buckets: proof of where they run."""
        counts: dict[str, int] = {}
        for bound in self._buckets.values():
            for provider, operators in bound.placements.items():
                counts[provider] = counts.get(provider, 0) + operators
        return counts


class _Bound:
    """One bucket: its session, and the tensors on the device that its CUDA graph reads and writes."""

    def __init__(self, file: Path, bucket: Bucket, device: int, addresses: Mapping[str, int]) -> None:
        self.bucket = bucket
        options = ort.SessionOptions()
        for letter in ("b", "h", "n"):
            # With every length known, what computes shapes is folded away and no operator is left for the CPU.
            options.add_free_dimension_override_by_name(letter, getattr(bucket, letter))
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # TF32 has half's precision; the float parts are float for a reason.
        cuda = {"device_id": device, "enable_cuda_graph": "1", "use_tf32": "0"}
        try:
            self._session = ort.InferenceSession(str(file), options, providers=[(PROVIDER, cuda)])
        except Exception as error:  # onnxruntime raises its own types, all of them below Exception
            raise ArtifactError(f"{file.name} cannot run on the GPU alone: {str(error).splitlines()[0]}") from error
        if self._session.get_providers()[0] != PROVIDER:
            raise ArtifactError(f"{file.name} was to run on the GPU and got {self._session.get_providers()}")
        self.placements: dict[str, int] = {}
        for part in self._session.get_provider_graph_assignment_info():
            self.placements[part.ep_name] = self.placements.get(part.ep_name, 0) + len(part.get_nodes())
        self._binding = self._session.io_binding()
        types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        self.inputs: dict[str, ort.OrtValue] = {}
        for entry in self._session.get_inputs():
            shape = [getattr(bucket, size) if isinstance(size, str) else size for size in entry.shape]
            if entry.name in addresses:
                kind = types[entry.type]
                self._binding.bind_input(entry.name, "cuda", device, kind, shape, addresses[entry.name])
                continue
            self.inputs[entry.name] = ort.OrtValue.ortvalue_from_numpy(
                np.zeros(shape, types[entry.type]), "cuda", device
            )
            self._binding.bind_ortvalue_input(entry.name, self.inputs[entry.name])
        self.outputs: dict[str, ort.OrtValue] = {}
        d = self.inputs["prompt_vector"].shape()[1]
        for name, shape in (("user_vector", [bucket.b, d]), ("scores", [bucket.b, bucket.n])):
            self.outputs[name] = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cuda", device)
            self._binding.bind_ortvalue_output(name, self.outputs[name])
        self._session.run_with_iobinding(self._binding)  # records the CUDA graph

    def feed(self, inputs: Mapping[str, NDArray[np.generic]]) -> None:
        for name in self.inputs:
            self.inputs[name].update_inplace(self.bucket.padded(name, inputs[name]))

    def launch(self) -> None:
        """Run on what is on the device; returns when it is done."""
        self._session.run_with_iobinding(self._binding)

    def replay(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.launch()
        user, scores = (self.outputs[name].numpy() for name in OUTPUTS)
        return user, scores
