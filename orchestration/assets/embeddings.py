"""Assets of vectors: item texts encoded when they change, item vectors of the models that serve or may."""

import tempfile
import time
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from inference import artifacts
from inference.encoder import TextEncoder
from orchestration import metadata
from orchestration.metadata import OWNER, column_schema
from orchestration.progress import progress
from orchestration.ranges import asset_span
from orchestration.resources import Larder
from schemas import tables
from schemas.manifest import ENCODER_PATH
from schemas.urls import local_folder

GROUP = "embeddings"


class AlsoRefresh(dg.Config):
    """Model versions that are to know every item beside those that serve or may soon: say it before a rollback to one."""

    versions: list[str] = Field(default=[])


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
    deps=["items", "prompt_evaluation"],
    description="Item texts, written by the item template that won, as 384-dimensional vectors with an HNSW index. "
    "Only texts that are new or changed are encoded.",
    metadata=column_schema(tables.text_vectors),
    code_version="2",
)
def text_vectors(context: dg.AssetExecutionContext, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute.prompt_records import read_versions
    from orchestration.compute.vectors import index_recall, refresh_text_vectors

    with asset_span(context):
        start = time.monotonic()
        encoder = item_encoder(larder)
        with larder.connect() as connection:
            template = read_versions(connection).item
            report = refresh_text_vectors(connection, encoder, template=template, progress=progress(context))
            recall = index_recall(connection)
    if report.without_text:
        progress(context)(
            f"{report.without_text:,} items have no text at all: they share one vector, and only what people do tells them "
            "apart; give them a title, categories or a description"
        )
    return dg.MaterializeResult(
        metadata={
            metadata.ROWS: report.items,
            "encoded": report.encoded,
            "unchanged": report.kept,
            "without_text": report.without_text,
            "title_only": report.title_only,
            "index_recall_at_10": recall,
            "encoder_version": encoder.version,
            "template": template,
            metadata.SECONDS: time.monotonic() - start,
        }
    )


@dg.asset(
    group_name=GROUP,
    owners=[OWNER],
    kinds={"postgres"},
    deps=["text_vectors", "ranker_onnx"],
    description="The catalogue in the ranker's item space, a set per model version: what candidates are searched in. "
    "New items and changed texts are added without retraining, to what serves and to what a rollback may go back to.",
    metadata=column_schema(tables.item_vectors),
    code_version="2",
)
def item_vectors(context: dg.AssetExecutionContext, config: AlsoRefresh, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute.vectors import (
        refresh_item_vectors,
        tried_versions,
        versions_to_refresh,
        why_not_refreshed,
    )

    with asset_span(context), larder.connect() as connection:
        encoder = item_encoder(larder)
        also = [*config.versions, *tried_versions(connection, larder.record.experiments)]
        reports, skipped = {}, {}
        for version, path in versions_to_refresh(connection, also):
            folder = larder.fetch(path)
            if why := why_not_refreshed(folder, encoder):
                skipped[version] = why
            else:
                reports[version] = refresh_item_vectors(connection, folder, encoder)
    tell = progress(context)
    for version, report in reports.items():
        tell(f"model {version}: {report.encoded:,} item vectors written, {report.kept:,} unchanged")
    for version, why in skipped.items():
        tell(f"model {version} skipped: {why}")
    return dg.MaterializeResult(
        metadata={
            metadata.ROWS: sum(report.items for report in reports.values()),
            "encoded": sum(report.encoded for report in reports.values()),
            "model_versions": ", ".join(reports) or "none",
            "skipped": ", ".join(skipped) or "none",
        }
    )
