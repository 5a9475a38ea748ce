"""What a graph may refer to, read from its bytes and compared with what the `onnx` library says."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from released import write_release

from inference.onnx_file import check, read
from inference.ranker import Ranker
from schemas.errors import ArtifactError
from schemas.manifest import MANIFEST_FILE, RANKER_FP32, ArtifactFile, Manifest


def graph(
    domain: str = "", nodes: list[onnx.NodeProto] | None = None, weights: list[TensorProto] | None = None
) -> onnx.GraphProto:
    return helper.make_graph(
        nodes or [helper.make_node("Identity", ["x"], ["y"], domain=domain)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        weights or [],
    )


def model(body: onnx.GraphProto, *domains: str) -> bytes:
    opsets = [helper.make_opsetid(domain, 1) for domain in domains] or [helper.make_opsetid("", 17)]
    return helper.make_model(body, opset_imports=opsets).SerializeToString()


def outside(location: str | None) -> TensorProto:
    tensor = numpy_helper.from_array(np.ones(3, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    if location is not None:
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location
    return tensor


def test_an_own_graph_refers_to_nothing() -> None:
    found = read(model(graph()))
    assert (found.domains - {""}, found.locations) == (set(), set())
    check(model(graph("com.microsoft"), "", "com.microsoft"), "f.onnx")


@pytest.mark.parametrize("data", [model(graph("evil.ops")), model(graph(), "", "evil.ops")])
def test_operators_of_an_unknown_domain_are_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"f\.onnx uses operators of 'evil\.ops'"):
        check(data, "f.onnx")


def test_an_unknown_operator_within_a_branch_or_a_function_is_found() -> None:
    branch = helper.make_node("If", ["x"], ["y"], then_branch=graph("evil.ops"), else_branch=graph())
    assert "evil.ops" in read(model(graph(nodes=[branch]))).domains
    function = helper.make_function(
        "",
        "F",
        ["x"],
        ["y"],
        [helper.make_node("Identity", ["x"], ["y"], domain="evil.ops")],
        [helper.make_opsetid("", 17)],
    )
    whole = helper.make_model(graph(), functions=[function])
    assert "evil.ops" in read(whole.SerializeToString()).domains


@pytest.mark.parametrize("location", ["/etc/passwd", "../other/weights.bin", "weights.bin", None])
def test_weights_outside_the_artefact_are_refused(location: str | None) -> None:
    data = model(graph(weights=[outside(location)]))
    with pytest.raises(ArtifactError, match="takes weights from"):
        check(data, "f.onnx", ["other.bin"])
    constant = helper.make_node("Constant", [], ["y"], value=outside(location))
    with pytest.raises(ArtifactError, match="takes weights from"):
        check(model(graph(nodes=[constant])), "f.onnx")


def test_weights_in_a_verified_file_beside_it_are_allowed() -> None:
    found = check(model(graph(weights=[outside("weights.bin")])), "f.onnx", ["weights.bin"])
    assert found.locations == {"weights.bin"}


@pytest.mark.parametrize("data", [b"", b"not a graph", b"\x3a\xff\xff\xff\x7f", b"\x3a" * 40])
def test_what_is_no_model_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"f\.onnx: this is no ONNX model"):
        check(data, "f.onnx")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 120))
def test_bytes_of_any_kind_end_in_a_verdict(noise: bytes, place: int) -> None:
    whole = model(graph(weights=[outside("weights.bin")]))
    for data in (noise, whole[:place] + noise, whole[:place] + noise + whole[place:]):
        with suppress(ArtifactError):
            read(data)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("artifacts")
    return root / "models" / "ranker" / write_release(root, 1)


def altered(artifact: Path, place: Path, change: str) -> Path:
    """The artefact with another graph under a manifest that vouches for it."""
    for file in artifact.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    whole = onnx.load(artifact / RANKER_FP32)
    if change == "operator":
        whole.graph.node[0].domain = "evil.ops"
    else:
        weight = next(tensor for tensor in whole.graph.initializer if tensor.raw_data)
        (place / "weights.bin").write_bytes(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        entry = weight.external_data.add()
        entry.key, entry.value = "location", str(place / "weights.bin") if change == "outside" else "weights.bin"
    (place / RANKER_FP32).write_bytes(whole.SerializeToString())
    manifest = Manifest.from_json((artifact / MANIFEST_FILE).read_text())
    files = {
        file.name: ArtifactFile(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in place.iterdir()
        if file.name != MANIFEST_FILE
    }
    (place / MANIFEST_FILE).write_text(replace(manifest, files=files).to_json())
    return place


def test_a_ranker_loads_its_own_graph_and_weights_beside_it(artifact: Path, tmp_path: Path) -> None:
    assert Ranker(artifact, threads=1).provider == "CPUExecutionProvider"
    assert Ranker(altered(artifact, tmp_path, "beside"), threads=1).provider == "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("change", "words"), [("operator", "uses operators of 'evil.ops'"), ("outside", "takes weights from")]
)
def test_a_ranker_with_a_right_hash_and_a_wrong_graph_is_refused(
    artifact: Path, tmp_path: Path, change: str, words: str
) -> None:
    with pytest.raises(ArtifactError, match=words):
        Ranker(altered(artifact, tmp_path, change), threads=1)
