"""A released model without training: its files verify, and nothing of them is ever run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psycopg

from inference.artifacts import sha256_of
from infra import registry
from schemas.manifest import CHAMPION_POINTER, ENCODER_PATH, MANIFEST_FILE, POPULAR_ITEMS, ArtifactFile, Manifest
from schemas.urls import local_folder


def release_model(connection: psycopg.Connection[Any], artifacts_url: str, seed: int) -> str:
    """Write, register and promote a model below `artifacts_url` (file://); its version."""
    root = local_folder(artifacts_url)
    assert root is not None
    content = json.dumps([{"item_id": f"i{seed}", "title": "t", "score": 1.0}]).encode()
    draft = root / f"draft-{seed}"
    draft.mkdir(parents=True)
    (draft / POPULAR_ITEMS).write_bytes(content)
    files = {POPULAR_ITEMS: ArtifactFile(len(content), sha256_of(draft / POPULAR_ITEMS))}
    made = Manifest(
        "ranker", "small", 64, "f", (), (), "e", "item.v1", "wish.v1", "2026-01-01T00:00:00+00:00", seed, files
    )
    (draft / MANIFEST_FILE).write_text(made.to_json())
    path = f"models/ranker/{made.version}"
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    draft.rename(root / path)
    encoder: Path = root / ENCODER_PATH
    encoder.mkdir(parents=True, exist_ok=True)
    for name in ("encoder.json", "encoder.fp32.onnx", "encoder.int8.onnx", "tokenizer.json"):
        (encoder / name).write_text(f"{name} of the tests")
    registry.register(connection, made, path)
    registry.record_gate(connection, made.version, True, {"words": []})
    registry.promote(connection, made.version)
    connection.commit()
    (root / CHAMPION_POINTER).write_text(json.dumps({"version": made.version, "path": path}))
    return made.version
