"""What the ranker is fed, and which graph answers on which provider."""

from __future__ import annotations

import hashlib
import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from rankers import random_ranker

from inference.assemble import crossed, encode, recipe
from inference.cuda import PROVIDER, device_count
from inference.live import Columns
from inference.ranker import CpuEngine, Ranker, open_cuda
from inference.ranker_inputs import person_inputs
from inference.store import History, PersonRow
from orchestration.compute.export import cut, export_fp32, quantise, random_inputs
from orchestration.compute.folded import fold
from orchestration.compute.half import half
from orchestration.compute.model import Ranker as Model
from schemas.errors import ArtifactError
from schemas.events import KINDS
from schemas.manifest import (
    MANIFEST_FILE,
    RANKER_FP16,
    RANKER_FP32,
    RANKER_INT8,
    RANKER_INT8_PARTS,
    TEXT_PROJECTION,
    ArtifactFile,
    Manifest,
)
from schemas.ranker import CANDIDATE_INPUTS, PERSON_INPUTS, SIZES, TEXT_DIM, ZERO_VALUE
from schemas.views import CONTEXT_VIEWS, candidate_features, context_features, fingerprint

F, G, D = len(context_features()), len(candidate_features()), SIZES["small"].dim
AT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return random_ranker("small", F, G)


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of random weights, without the files that only the registry reads."""
    place = tmp_path_factory.mktemp("artifact")
    export_fp32(fold(model), place / RANKER_FP32, f=F, g=G, d=D)
    export_fp32(half(model), place / RANKER_FP16, f=F, g=G, d=D)
    requests = [random_inputs(1, 9, 16, f=F, g=G, d=D, seed=seed) for seed in range(8)]
    quantise(place / RANKER_FP32, place / RANKER_INT8, requests)
    cut(place / RANKER_INT8, *(place / name for name in RANKER_INT8_PARTS))
    np.savez(place / TEXT_PROJECTION, weight=np.ones((D, TEXT_DIM), np.float32), bias=np.zeros(D, np.float32))
    write_manifest(place)
    return place


def write_manifest(place: Path) -> None:
    files = {
        entry.name: ArtifactFile(entry.stat().st_size, hashlib.sha256(entry.read_bytes()).hexdigest())
        for entry in place.iterdir()
        if entry.name != MANIFEST_FILE
    }
    manifest = Manifest(
        "ranker", "small", D, fingerprint(), context_features(), candidate_features(), "e", "i", "w", "2026-01-01", 0, files
    )  # fmt: skip
    (place / MANIFEST_FILE).write_text(manifest.to_json())


class Card(CpuEngine):
    """The GPU's graph on the CPU provider, under the name of the provider that it would have got."""

    def __init__(self, file: Path, provider: str = PROVIDER) -> None:
        super().__init__(file, 1)
        assert self.provider == "CPUExecutionProvider"
        self.provider, self.asked = provider, 0

    def run(self, inputs: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.asked += 1
        return super().run(inputs)


# ---- which graph answers


@pytest.mark.skipif(device_count() > 0, reason="tests what happens without a GPU")
def test_without_a_card_the_cpu_answers_whatever_the_build_offers(folder: Path) -> None:
    ranker = Ranker(folder, threads=1)
    assert ranker.warming is None
    assert (ranker.provider, ranker.precision) == ("CPUExecutionProvider", "int8")
    assert np.isfinite(ranker.run(random_inputs(1, 5, 7, f=F, g=G, d=D, seed=1))[1]).all()


@pytest.mark.skipif(device_count() > 0, reason="tests what happens without a GPU")
@pytest.mark.skipif(PROVIDER not in onnxruntime.get_available_providers(), reason="needs the build for GPUs")
def test_a_gpu_that_was_asked_for_and_is_not_there_leaves_the_cpus_graph(folder: Path) -> None:
    ranker = Ranker(folder, threads=1, open_gpu=open_cuda)
    assert ranker.warming is not None
    ranker.warming.join(60)
    assert (ranker.provider, ranker.precision) == ("CPUExecutionProvider", "int8")


def test_the_cpu_answers_until_the_card_is_warm(folder: Path, model: Model) -> None:
    ready = threading.Event()

    def open_gpu(file: Path) -> Card:
        assert file.name == RANKER_FP16
        ready.wait(60)
        return Card(file)

    ranker = Ranker(folder, threads=1, open_gpu=open_gpu)
    inputs = random_inputs(1, 5, 7, f=F, g=G, d=D, seed=1)
    assert (ranker.provider, ranker.precision) == ("CPUExecutionProvider", "int8")
    ranker.run(inputs)
    ready.set()
    assert ranker.warming is not None
    ranker.warming.join(60)
    assert (ranker.provider, ranker.precision) == (PROVIDER, "fp16")
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})[1].numpy()
    # Int8 is not so close: it is the other graph that answered.
    assert np.abs(ranker.run(inputs)[1] - expected).max() <= 1e-3 * expected.std()


def test_a_graph_that_got_another_provider_is_not_used(folder: Path) -> None:
    ranker = Ranker(folder, threads=1, open_gpu=lambda file: Card(file, "CPUExecutionProvider"))
    assert ranker.warming is not None
    ranker.warming.join(60)
    assert (ranker.provider, ranker.precision) == ("CPUExecutionProvider", "int8")


def test_a_card_that_is_lost_gives_its_requests_back(folder: Path) -> None:
    class Lost(Card):
        def run(self, inputs: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            raise RuntimeError("CUDA error 719")

    ranker = Ranker(folder, threads=1, open_gpu=Lost)
    assert ranker.warming is not None
    ranker.warming.join(60)
    assert ranker.provider == PROVIDER
    inputs = random_inputs(1, 5, 7, f=F, g=G, d=D, seed=1)
    np.testing.assert_array_equal(ranker.run(inputs)[1], CpuEngine(folder / RANKER_INT8, 1).run(inputs)[1])
    assert (ranker.provider, ranker.precision) == ("CPUExecutionProvider", "int8")


@pytest.mark.parametrize("kind", ["two files", "one file", "float", "card"])
def test_a_run_in_two_halves_is_a_run_in_one(folder: Path, tmp_path: Path, kind: str) -> None:
    for entry in folder.iterdir():
        if kind != "one file" or entry.name not in RANKER_INT8_PARTS:
            (tmp_path / entry.name).write_bytes(entry.read_bytes())
    write_manifest(tmp_path)
    ranker = Ranker(
        tmp_path, threads=1, precision="fp32" if kind == "float" else "int8", open_gpu=Card if kind == "card" else None
    )
    if ranker.warming is not None:
        ranker.warming.join(60)
    inputs = random_inputs(3, 20, 30, f=F, g=G, d=D, seed=4)
    person = {name: inputs[name] for name in PERSON_INPUTS}
    begun = ranker.begin(person)
    assert (begun.states is not None) == (kind == "two files")
    scores = ranker.finish(begun, {name: inputs[name] for name in CANDIDATE_INPUTS})
    graph = {"card": RANKER_FP16, "float": RANKER_FP32}.get(kind, RANKER_INT8)
    user_vector, expected = CpuEngine(folder / graph, 1).run(inputs)
    np.testing.assert_array_equal(begun.user_vector, user_vector)
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(ranker.run(inputs)[1], expected)


def test_a_run_that_began_on_the_cpu_ends_there_though_a_card_is_warm_by_then(folder: Path) -> None:
    ready = threading.Event()

    def open_gpu(file: Path) -> Card:
        ready.wait(60)
        return Card(file)

    ranker = Ranker(folder, threads=1, open_gpu=open_gpu)
    inputs = random_inputs(1, 5, 7, f=F, g=G, d=D, seed=1)
    begun = ranker.begin(inputs)
    ready.set()
    assert ranker.warming is not None
    ranker.warming.join(60)
    np.testing.assert_array_equal(ranker.finish(begun, inputs), CpuEngine(folder / RANKER_INT8, 1).run(inputs)[1])


@pytest.mark.parametrize("part", [0, 1])
def test_halves_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path, part: int) -> None:
    for entry in folder.iterdir():
        (tmp_path / entry.name).write_bytes(entry.read_bytes())
    (tmp_path / RANKER_INT8_PARTS[part]).write_bytes((folder / RANKER_INT8).read_bytes())
    write_manifest(tmp_path)
    with pytest.raises(ArtifactError, match=r"has inputs .* and outputs .*; export it again"):
        Ranker(tmp_path, threads=1)


def test_what_no_bucket_holds_goes_to_the_cpu(folder: Path) -> None:
    class Narrow(Card):
        def holds(self, inputs: Any) -> bool:
            return bool(inputs["candidate_vectors"].shape[1] <= 4)

    cards: list[Narrow] = []

    def open_gpu(file: Path) -> Narrow:
        cards.append(Narrow(file))
        return cards[0]

    ranker = Ranker(folder, threads=1, open_gpu=open_gpu)
    assert ranker.warming is not None
    ranker.warming.join(60)
    for n in (3, 9):
        assert ranker.run(random_inputs(1, 5, n, f=F, g=G, d=D, seed=1))[1].shape == (1, n)
    assert cards[0].asked == 1


def test_an_artifact_without_a_graph_for_the_gpu_stays_on_the_cpu(folder: Path, tmp_path: Path) -> None:
    for entry in folder.iterdir():
        if entry.name not in (RANKER_FP16, RANKER_INT8, *RANKER_INT8_PARTS):
            (tmp_path / entry.name).write_bytes(entry.read_bytes())
    write_manifest(tmp_path)
    ranker = Ranker(tmp_path, threads=1, open_gpu=Card)
    assert ranker.warming is None
    assert (ranker.provider, ranker.precision) == ("CPUExecutionProvider", "fp32")


def test_an_artifact_that_learned_other_features_is_refused(folder: Path, tmp_path: Path) -> None:
    for entry in folder.iterdir():
        (tmp_path / entry.name).write_bytes(entry.read_bytes())
    raw = json.loads((tmp_path / MANIFEST_FILE).read_text())
    raw["context_features"] = raw["context_features"][::-1]
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match=r"train again after changing schemas/views\.py"):
        Ranker(tmp_path, threads=1)


# ---- what it is fed


def person(vectors: list[NDArray[np.float32] | None], values: list[float | None] | None = None) -> PersonRow:
    n = len(vectors)
    history = History(
        [f"i{row}" for row in range(n)],
        [f"title {row}" for row in range(n)],
        [KINDS[row % len(KINDS)] for row in range(n)],
        values or [float(row + 1) for row in range(n)],
        np.array([(AT - timedelta(hours=n - row)).timestamp() for row in range(n)]),
        vectors,
    )
    nothing = Columns([], {}, np.empty(0), settled=False)
    return PersonRow(None, history, {view.name: nothing for view in CONTEXT_VIEWS})


def unit(seed: int) -> NDArray[np.float32]:
    vector = np.random.default_rng(seed).standard_normal(D).astype(np.float32)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


def test_an_event_whose_item_has_gone_is_left_out_so_that_the_newest_stands_last(folder: Path) -> None:
    some = [unit(row) for row in range(3)]
    inputs = person_inputs(person([*some, None]), AT, None, D)
    assert inputs["history_mask"].tolist() == [[1, 1, 1]]
    np.testing.assert_array_equal(inputs["history_vectors"][0], some)
    np.testing.assert_array_equal(inputs["history_kinds"][0], [1, 2, 3])
    np.testing.assert_allclose(inputs["history_gaps"][0], [3600, 3600, 7200])
    inputs = person_inputs(person([some[0], None, some[1], np.ones(D + 1, np.float32)]), AT, None, D)
    np.testing.assert_array_equal(inputs["history_vectors"][0], some[:2])
    np.testing.assert_allclose(inputs["history_gaps"][0], [7200, 7200])
    # The user vector hears of the history although the newest item has gone.
    ranker = Ranker(folder, threads=1)
    heard = [ranker.begin(person_inputs(person([unit(seed), None]), AT, None, D)).user_vector for seed in (1, 2)]
    assert np.abs(heard[0] - heard[1]).max() > 1e-3


def test_nobody_with_a_known_item_reads_as_nobody() -> None:
    inputs = person_inputs(person([None, None]), AT, None, D)
    assert inputs["history_mask"].tolist() == [[0]]
    assert not inputs["history_vectors"].any()


def test_a_value_that_is_no_number_is_no_value() -> None:
    inputs = person_inputs(person([unit(1), unit(2), unit(3)], [float("nan"), None, 4.0]), AT, None, D)
    assert inputs["history_values"].tolist() == [[0, 0, 4]]


def test_a_value_of_zero_is_a_value_as_in_training() -> None:
    inputs = person_inputs(person([unit(1), unit(2)], [0.0, 4.0]), AT, None, D)
    assert inputs["history_values"].tolist() == [[pytest.approx(ZERO_VALUE), 4]]


@pytest.mark.parametrize("wild", [np.nan, np.inf, -np.inf, 1e300])
def test_a_feature_that_is_no_number_counts_as_missing(wild: float) -> None:
    made = recipe((CONTEXT_VIEWS[0],))
    raw = np.ones((2, len(made.order)))
    raw[1, 0] = wild
    values, valid = encode(made, raw, log1p=True)
    assert np.isfinite(values).all()
    assert values[1, 0] == 0
    assert not valid[1, 0]
    assert valid.sum() == valid.size - 1


def test_a_masked_category_does_not_spread() -> None:
    values, mask = crossed(
        np.array([[np.nan], [2.0]], np.float32), np.array([[0.0], [1.0]], np.float32), np.ones((3, 2), np.float32)
    )
    assert values.tolist() == [[2.0]] * 3
    assert mask.tolist() == [[1.0]] * 3


@pytest.mark.parametrize("name", [RANKER_FP32, RANKER_INT8, RANKER_FP16])
@pytest.mark.parametrize("part", ["context", "candidate"])
def test_no_graph_lets_what_is_masked_through(folder: Path, name: str, part: str) -> None:
    engine = CpuEngine(folder / name, 1)
    inputs = random_inputs(1, 5, 7, f=F, g=G, d=D, seed=1)
    inputs[f"{part}_mask"][..., 0] = 0
    expected = engine.run(inputs)
    inputs[f"{part}_features"][..., 0] = np.nan
    for answer, other in zip(engine.run(inputs), expected, strict=True):
        np.testing.assert_array_equal(answer, other)


def test_the_user_and_the_wish_come_from_the_same_space(folder: Path) -> None:
    ranker = Ranker(folder, threads=1)
    projected = ranker.project(np.ones((2, TEXT_DIM), np.float32))
    np.testing.assert_allclose(np.linalg.norm(projected, axis=1), 1, atol=1e-6)
