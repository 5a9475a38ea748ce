"""The manifest of one training run: what was built, from what, how good it is, hash by hash.

An artefact is a folder `models/ranker/<version>/` whose `manifest.json` names every other file with
its size and SHA-256. `version` is the hash of the manifest without itself, so a folder never changes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from schemas.errors import ArtifactError
from schemas.prompts import DEFAULTS

MANIFEST_FILE = "manifest.json"
RANKER_FP32 = "ranker.cpu-fp32.onnx"
RANKER_INT8 = "ranker.cpu-int8.onnx"
RANKER_INT8_PARTS = ("ranker.cpu-int8-person.onnx", "ranker.cpu-int8-candidates.onnx")
"""The int8 graph in two: what hangs on the person alone, and the candidates' part, which begins with what that gave."""
RANKER_FP16 = "ranker.cuda-fp16.onnx"
"""For the CUDA provider: products in half precision, inputs and outputs float; not for the CPU, which emulates it."""
TEXT_PROJECTION = "text_projection.npz"
"""Arrays `weight (d, 384) float32` and `bias (d,) float32`: item space = normalise(weight·text + bias)."""
ITEM_RESIDUALS = "item_residuals.npz"
"""Arrays `item_ids (m,) str` and `residuals (m, d) float32`: v = normalise(projected text + residual)."""
ENCODER_PATH = "encoders/text"
"""Where the exported text encoder lies below ARTIFACTS_URL."""
CHAMPION_POINTER = "models/champion.json"
"""`{"version", "path"}` of the last release: what a function falls back on while the database cannot be asked."""
POPULAR_ITEMS = "popular_items.json"
"""The list that answers when the database cannot: `[{"item_id", "title", "score", "categories", "attributes"}, …]`."""


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """One file of an artefact: its size in bytes and SHA-256 in hex."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a function must know before it loads a model, and a person before trusting it."""

    name: str
    size: str
    dim: int
    feature_fingerprint: str
    context_features: tuple[str, ...]
    candidate_features: tuple[str, ...]
    encoder_version: str
    item_template: str
    wish_template: str
    trained_until: str
    seed: int
    files: dict[str, ArtifactFile]
    quality: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    latency_ms: dict[str, float] = field(default_factory=dict)
    profile_template: str = DEFAULTS["profile"]
    wish_weight: float = 0.0
    """Logits per unit of cosine between a wish's text and an item's; chosen on validation labels."""

    @property
    def version(self) -> str:
        """Hash of the manifest's content: 16 hex digits, the model version everywhere."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces that matter."""
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote. Raises ArtifactError for anything else."""
        try:
            raw = json.loads(text)
            raw["files"] = {name: ArtifactFile(**entry) for name, entry in raw["files"].items()}
            raw["context_features"] = tuple(raw["context_features"])
            raw["candidate_features"] = tuple(raw["candidate_features"])
            return cls(**raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(f"this is not a manifest of ours ({error}); train and release again") from error
