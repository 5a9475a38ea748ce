"""Assets of vectors: item texts encoded when they change, item vectors of the model that is about to serve."""

import tempfile
import time
from pathlib import Path
from typing import Any

import dagster as dg

from inference import artifacts
from inference.encoder import TextEncoder
from orchestration import metadata
from orchestration.metadata import OWNER, column_schema
from orchestration.progress import progress
from orchestration.ranges import asset_span
from orchestration.resources import Larder
from schemas import prompts, tables
from schemas.manifest import ENCODER_PATH
from schemas.urls import local_folder
from schemas.views import fingerprint

GROUP = "embeddings"


def item_encoder(larder: Larder) -> TextEncoder:
    """The float encoder for items, exported on first use."""
    from orchestration.compute.encoder import export_encoder  # brings in torch and Optimum

    root = local_folder(larder.artifacts_url)
    if root is not None:
        folder = root / ENCODER_PATH
        export_encoder(folder)
    else:
        with tempfile.TemporaryDirectory(prefix="larder-encoder-") as scratch:
            export_encoder(Path(scratch) / "encoder")
            artifacts.publish(larder.artifacts_url, ENCODER_PATH, Path(scratch) / "encoder")
        folder = artifacts.fetch(larder.artifacts_url, ENCODER_PATH)
    return TextEncoder(folder, precision="fp32")


@dg.asset(
    group_name=GROUP,
    owners=[OWNER],
    kinds={"onnx", "postgres"},
    deps=["items"],
    description="Item texts, written by a versioned template, as 384-dimensional vectors with an HNSW index. "
    "Only texts that are new or changed are encoded.",
    metadata=column_schema(tables.text_vectors),
    code_version=prompts.ITEM_TEMPLATE,
)
def text_vectors(context: dg.AssetExecutionContext, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute.vectors import index_recall, refresh_text_vectors

    with asset_span(context):
        start = time.monotonic()
        encoder = item_encoder(larder)
        with larder.connect() as connection:
            report = refresh_text_vectors(connection, encoder, progress=progress(context))
            recall = index_recall(connection)
    return dg.MaterializeResult(
        metadata={
            metadata.ROWS: report.items,
            "encoded": report.encoded,
            "unchanged": report.kept,
            "index_recall_at_10": recall,
            "encoder_version": encoder.version,
            "template": prompts.ITEM_TEMPLATE,
            metadata.SECONDS: time.monotonic() - start,
        }
    )


@dg.asset(
    group_name=GROUP,
    owners=[OWNER],
    kinds={"postgres"},
    deps=["text_vectors", "ranker_onnx"],
    description="The catalogue in the ranker's item space, a set per model version: what candidates are searched in. "
    "New items and changed texts are added without retraining.",
    metadata=column_schema(tables.item_vectors),
    code_version="1",
)
def item_vectors(context: dg.AssetExecutionContext, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute.vectors import feature_fingerprint_of, refresh_item_vectors

    with asset_span(context), larder.connect() as connection:
        # The newest version is about to serve; the champion must learn of new items too.
        versions = connection.execute(
            "SELECT DISTINCT ON (version) version, path FROM (SELECT * FROM (SELECT version, path, created_at FROM model_versions "
            "ORDER BY created_at DESC LIMIT 1) AS newest UNION ALL SELECT m.version, m.path, m.created_at FROM model_versions AS m "
            "JOIN model_aliases AS a USING (version)) AS wanted"
        ).fetchall()
        reports, skipped = {}, []
        for version, path in versions:
            folder = larder.fetch(path)
            if feature_fingerprint_of(folder) != fingerprint():
                skipped.append(version)
            else:
                reports[version] = refresh_item_vectors(connection, folder)
    tell = progress(context)
    for version, report in reports.items():
        tell(f"model {version}: {report.encoded:,} item vectors written, {report.kept:,} unchanged")
    for version in skipped:
        tell(
            f"model {version} skipped: it learned other features than schemas/views.py declares now, so it does not serve; "
            "the floor does until the next training (make run RETRAIN=1)"
        )
    return dg.MaterializeResult(
        metadata={
            metadata.ROWS: sum(report.items for report in reports.values()),
            "encoded": sum(report.encoded for report in reports.values()),
            "model_versions": ", ".join(reports) or "none",
            "skipped": ", ".join(skipped) or "none",
        }
    )
