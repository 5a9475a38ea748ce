"""The ranker at work: one verified artefact, one ONNX session, numpy in and numpy out."""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from inference import metrics
from inference.artifacts import verified, verify
from inference.cuda import PROVIDER, Bucket, CudaSession, device_count
from inference.onnx_file import check
from inference.telemetry import Value, span
from schemas.errors import ArtifactError
from schemas.manifest import (
    RANKER_FP16,
    RANKER_FP32,
    RANKER_INT8,
    RANKER_INT8_PARTS,
    TEXT_PROJECTION,
)
from schemas.ranker import CANDIDATE_INPUTS, INPUTS, MAX_CANDIDATES, MAX_HISTORY, OUTPUTS, PERSON_INPUTS
from schemas.views import candidate_features, context_features, fingerprint

logger = logging.getLogger(__name__)

Inputs = Mapping[str, NDArray[np.generic]]
Answer = tuple[NDArray[np.float32], NDArray[np.float32]]


class Engine(Protocol):
    """What runs a graph; `inference.cuda.CudaSession` is one."""

    provider: str

    def holds(self, inputs: Inputs) -> bool: ...

    def run(self, inputs: Inputs) -> Answer: ...


class CpuEngine:
    """`file` on ONNX Runtime's CPU provider, for inputs of any shape."""

    def __init__(self, file: Path, threads: int, graph: bytes | None = None) -> None:
        """`graph` is the file's content where it was read already: then what was verified is what is loaded."""
        self._session = _session(file, threads, graph)
        _check_signature(file, self._session, set(INPUTS), set(OUTPUTS))
        self.provider: str = self._session.get_providers()[0]

    def holds(self, inputs: Inputs) -> bool:
        return True

    def run(self, inputs: Inputs) -> Answer:
        user_vector, scores = self._session.run(list(OUTPUTS), {name: inputs[name] for name in INPUTS})
        return user_vector, scores


class CutEngine:
    """A graph in two files on ONNX Runtime's CPU provider: the person's part and the candidates', which goes on with what
    the first one gave."""

    def __init__(
        self, person: Path, candidates: Path, threads: int, graphs: tuple[bytes | None, bytes | None] = (None, None)
    ) -> None:
        """`graphs` are the files' contents where they were read already."""
        self._person = _session(person, threads, graphs[0])
        self._candidates = _session(candidates, threads, graphs[1])
        self._made = [entry.name for entry in self._person.get_outputs()]
        states = {name for name in self._made if name not in OUTPUTS}
        _check_signature(person, self._person, set(PERSON_INPUTS), {OUTPUTS[0], *states})
        _check_signature(candidates, self._candidates, {*CANDIDATE_INPUTS, *states}, {OUTPUTS[1]})
        self.provider: str = self._candidates.get_providers()[0]

    def holds(self, inputs: Inputs) -> bool:
        return True

    def begin(self, person: Inputs) -> tuple[NDArray[np.float32], Inputs]:
        """`user_vector (b, d)` of the inputs that describe people, and what `finish` goes on with."""
        states = dict(
            zip(self._made, self._person.run(self._made, {name: person[name] for name in PERSON_INPUTS}), strict=True)
        )
        return states.pop(OUTPUTS[0]), states

    def finish(self, states: Inputs, candidates: Inputs) -> NDArray[np.float32]:
        """`scores (b, n)` of the inputs that describe candidates."""
        own = {name: candidates[name] for name in CANDIDATE_INPUTS}
        scores: NDArray[np.float32] = self._candidates.run(None, {**states, **own})[0]
        return scores

    def run(self, inputs: Inputs) -> Answer:
        user_vector, states = self.begin(inputs)
        return user_vector, self.finish(states, inputs)


@dataclass(frozen=True, slots=True)
class Begun:
    """A run of which the candidates are still to come: `user_vector (b, d)` by what is known of the people, `inputs`."""

    user_vector: NDArray[np.float32]
    inputs: Inputs
    states: Inputs | None = None
    """What a graph in two files goes on with; another one begins anew."""


class Ranker:
    """Scores candidates for one request at a time; safe to share between threads.

    `precision` asks for a file, `int8` or `fp32`; an artefact whose int8 did not pass its gate has fp32 alone. The CPU
    answers first. Where there is a GPU and the artefact has a graph for it, that graph is made ready beside the requests
    and takes over once its sessions have really got the CUDA provider; if they have not, or the card fails later, the
    CPU goes on. `provider` and `precision` say what answers now. Raises ArtifactError if the artefact was changed,
    expects other features than this code assembles, or has another signature.
    """

    def __init__(
        self,
        folder: Path,
        *,
        version: str | None = None,
        precision: str = "int8",
        threads: int = 0,
        open_gpu: Callable[[Path], Engine] | None = None,
    ) -> None:
        """`open_gpu` opens the artefact's graph for the GPU; by default `open_cuda` where the driver shows a card."""
        self.manifest = verify(folder, ())
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
        self._cpu_precision = precision if RANKER_INT8 in self.manifest.files else "fp32"
        graphs = [RANKER_INT8 if self._cpu_precision == "int8" else RANKER_FP32]
        # Of an artefact that was made before there were two files, the whole graph answers.
        if self._cpu_precision == "int8" and set(RANKER_INT8_PARTS) <= self.manifest.files.keys():
            graphs = list(RANKER_INT8_PARTS)
        # What is read below is verified as it is read.
        verify(folder, self.manifest.files.keys() - {*graphs, TEXT_PROJECTION})
        files, contents = [folder / name for name in graphs], [self._read_graph(name) for name in graphs]
        self._cut = CutEngine(files[0], files[1], threads, (contents[0], contents[1])) if len(graphs) == 2 else None
        self._cpu: Engine = self._cut or CpuEngine(files[0], threads, contents[0])
        self._gpu: Engine | None = None
        projection = verified(folder, TEXT_PROJECTION, self.manifest.files, read=True)
        with np.load(io.BytesIO(projection), allow_pickle=False) as arrays:
            self._weight = arrays["weight"].astype(np.float32)
            self._bias = arrays["bias"].astype(np.float32)
        if open_gpu is None and device_count() > 0:
            open_gpu = open_cuda
        self.warming: threading.Thread | None = None
        """Makes the GPU ready, if there is one; done when it has joined."""
        if open_gpu is not None and RANKER_FP16 in self.manifest.files:
            self.warming = threading.Thread(target=self._take_over, args=(open_gpu,), name="gpu", daemon=True)
            self.warming.start()

    def _read_graph(self, name: str) -> bytes | None:
        """The verified content of a graph; None where it has to be opened by its name."""
        graph = verified(self.folder, name, self.manifest.files, read=True)
        found = check(graph, str(self.folder / name), self.manifest.files)
        # Weights in a file of their own are found beside the graph only if it is opened by its name.
        return None if found.locations else graph

    @property
    def provider(self) -> str:
        """The execution provider that answers now."""
        return (self._gpu or self._cpu).provider

    @property
    def precision(self) -> str:
        """The precision of what answers now: `int8` or `fp32` on the CPU, `fp16` on the GPU."""
        return _precision(self._gpu, self._cpu_precision)

    def _take_over(self, open_gpu: Callable[[Path], Engine]) -> None:
        try:
            graph = verified(self.folder, RANKER_FP16, self.manifest.files, read=True)
            check(graph, str(self.folder / RANKER_FP16), self.manifest.files)
            engine = open_gpu(self.folder / RANKER_FP16)
        except Exception:  # whatever a driver does, requests must not feel it
            logger.exception("the GPU cannot run model %s; the CPU goes on", self.version)
            return
        if engine.provider != PROVIDER:
            logger.error(
                "the graph for the GPU got %s instead of %s; the CPU goes on with its own", engine.provider, PROVIDER
            )
            return
        self._gpu = engine

    def project(self, text_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Texts `(n, 384)` in item space `(n, dim)`, normalised."""
        projected = text_vectors @ self._weight.T + self._bias
        norm = np.linalg.norm(projected, axis=-1, keepdims=True)
        return np.asarray(projected / np.maximum(norm, 1e-12), np.float32)

    def run(self, inputs: Inputs) -> Answer:
        """`user_vector (b, d)` and `scores (b, n)` for the inputs described in schemas/ranker.py."""
        gpu = self._gpu  # one reference for the whole request: it may be taken away meanwhile
        if gpu is not None and gpu.holds(inputs):
            try:
                return self._run(gpu, _precision(gpu, self._cpu_precision), inputs)
            except Exception:  # a lost card raises one of ONNX Runtime's own types
                logger.exception("the GPU failed with model %s; the CPU takes over again", self.version)
                self._gpu = None
        return self._run(self._cpu, self._cpu_precision, inputs)

    def begin(self, person: Inputs) -> Begun:
        """The user vectors of people, by the inputs that describe them, before their candidates are known."""
        if self._cut is not None and self._gpu is None:
            with span("rank", attributes=self._attributes(self._cut, self._cpu_precision, 0)):
                user_vector, states = self._cut.begin(person)
            return Begun(user_vector, person, states)
        b, width = len(person["history_mask"]), len(self.manifest.candidate_features)
        return Begun(self.run({**person, **no_candidates(b, self.dim, width)})[0], person)

    def finish(self, begun: Begun, candidates: Inputs) -> NDArray[np.float32]:
        """`scores (b, n)` of candidates, by the inputs that describe them, for the people of `begun`."""
        # A card that took over in between may have the next request.
        if self._cut is None or begun.states is None:
            return self.run({**begun.inputs, **candidates})[1]
        rows = int(candidates["candidate_vectors"].shape[1])
        with span("rank", attributes=self._attributes(self._cut, self._cpu_precision, rows)):
            scores = self._cut.finish(begun.states, candidates)
        metrics.ranked(rows)
        return scores

    def _run(self, engine: Engine, precision: str, inputs: Inputs) -> Answer:
        rows = int(inputs["candidate_vectors"].shape[1])
        with span("rank", attributes=self._attributes(engine, precision, rows)):
            answer = engine.run(inputs)
        metrics.ranked(rows)
        return answer

    def _attributes(self, engine: Engine, precision: str, rows: int) -> dict[str, Value]:
        return {
            "recsys.model.version": self.version,
            "recsys.model.provider": engine.provider,
            "recsys.precision": precision,
            "recsys.rank.rows": rows,
        }


def no_candidates(b: int, dim: int, width: int) -> dict[str, NDArray[np.generic]]:
    """One empty candidate for each of `b` people: what a graph in one file is fed when only the user vector is wanted."""
    empty = np.zeros((b, 1, width), np.float32)
    return {
        "candidate_vectors": np.zeros((b, 1, dim), np.float32),
        "candidate_features": empty,
        "candidate_mask": empty,
    }


def open_cuda(file: Path) -> CudaSession:
    """`file` on the GPU for one request: a bucket for the user vector alone and three for candidates.

    Raises ArtifactError if any operator would run elsewhere.
    """
    return CudaSession(file, [Bucket(1, MAX_HISTORY, n) for n in (1, 128, 500, MAX_CANDIDATES)])


def _precision(gpu: Engine | None, cpu_precision: str) -> str:
    return cpu_precision if gpu is None else "fp16"


def _first_difference(theirs: tuple[str, ...], ours: tuple[str, ...]) -> str:
    """Where two orders of features part, in words; nothing where they do not."""
    for place, (its, own) in enumerate(zip_longest(theirs, ours)):
        if its != own:
            return f": at place {place + 1} it has {its!r} where this code has {own!r}"
    return ""


def _session(file: Path, threads: int, graph: bytes | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Threads wait for each other some two hundred times in a run: sleeping in between costs a quarter of it (2.7 ms for
    # 2.1). Once the run is over nobody may spin: other requests, and the database beside us, need the processor.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = ort.InferenceSession(
            graph or str(file),
            options,
            providers=["CPUExecutionProvider"],
            # The fused operator walks its rows number by number: of 500 candidates it takes four times as long as the two
            # that it replaces, 7 % of a run.
            disabled_optimizers=["SkipLayerNormFusion"],
        )
    except Exception as error:  # onnxruntime raises its own unrelated types for a malformed graph
        raise ArtifactError(f"ONNX Runtime cannot load {file} ({type(error).__name__}); export it again") from error
    return session


def _check_signature(file: Path, session: ort.InferenceSession, inputs: set[str], outputs: set[str]) -> None:
    names = {entry.name for entry in session.get_inputs()}, {entry.name for entry in session.get_outputs()}
    if names != (inputs, outputs):
        raise ArtifactError(f"{file} has inputs {sorted(names[0])} and outputs {sorted(names[1])}; export it again")
