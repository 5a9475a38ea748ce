"""Assets of learning: the floor's lists, the training set, the ranker, its evaluation, its ONNX artefact."""

import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg

from inference import artifacts
from infra import registry
from orchestration import metadata
from orchestration.metadata import OWNER, column_schema
from orchestration.progress import progress
from orchestration.ranges import asset_span
from orchestration.resources import Larder
from schemas import tables

GROUP = "ranker"
SPLITS = ("leave_one_out", "time_split")


class Training(dg.Config):
    """What a person may turn in the launchpad; everything else is in `TrainConfig`.

    The defaults take some minutes on two cores for a hundred thousand events; more epochs buy more quality.
    """

    size: str = "small"
    epochs: int = 12
    slate_rows: int = 6000
    seed: int = 0

    def settings(self) -> Any:
        from orchestration.compute.train_config import TrainConfig

        return TrainConfig(
            size=self.size, seed=self.seed, epochs=self.epochs, slate_rows=self.slate_rows, validation_labels=500
        )


@dg.asset(
    group_name=GROUP,
    owners=[OWNER],
    kinds={"postgres"},
    deps=["events", "items"],
    description="What is popular, what is trending this week and what is new: candidates, and the list that answers "
    "when nothing else can.",
    metadata=column_schema(tables.popular_items),
    code_version="1",
)
def popular_items(context: dg.AssetExecutionContext, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute.interactions import load_interactions
    from orchestration.compute.lists import refresh_popular_items

    with asset_span(context), larder.connect() as connection:
        report = refresh_popular_items(connection, load_interactions(larder.lake, connection), datetime.now(UTC))
    return dg.MaterializeResult(metadata={metadata.ROWS: sum(report.rows.values()), **report.rows})


@dg.asset(
    group_name=GROUP,
    owners=[OWNER],
    kinds={"postgres"},
    deps=["events", "items"],
    description="What people went on to after an item: the floor that a ranker must beat, a candidate source and a reason.",
    metadata=column_schema(tables.co_visitation),
    code_version="1",
)
def co_visitation(context: dg.AssetExecutionContext, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute.interactions import load_interactions
    from orchestration.compute.lists import refresh_co_visitation

    with asset_span(context), larder.connect() as connection:
        report = refresh_co_visitation(connection, load_interactions(larder.lake, connection))
    return dg.MaterializeResult(metadata={metadata.ROWS: report.rows["co_visitation"]})


@dg.asset(
    group_name=GROUP,
    owners=[OWNER],
    kinds={"duckdb", "parquet"},
    deps=[dg.AssetDep("events", partition_mapping=dg.AllPartitionMapping()), "items"],
    description="Recent labels with what was known of the person at that very moment, and nothing later.",
    code_version="1",
)
def training_set(context: dg.AssetExecutionContext, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute.training_set import build_training_set

    with asset_span(context):
        start = time.monotonic()
        with larder.connect() as connection:
            report = build_training_set(larder.lake, connection, larder.artifacts_url)
    progress(context)(f"{report.labels:,} labels of {report.people:,} people, as known at each label")
    return dg.MaterializeResult(
        metadata={
            metadata.ROWS: report.labels,
            "people": report.people,
            metadata.NULL_RATE: report.null_rate,
            "size_bytes": report.size_bytes,
            "data_version": report.version,
            metadata.SECONDS: time.monotonic() - start,
        }
    )


@dg.asset(
    group_name=GROUP,
    owners=[OWNER],
    kinds={"pytorch"},
    deps=["training_set", "text_vectors"],
    description="The transformer ranker, trained on everything but each person's last event (that one judges it) and some of the newest (they validate).",
    code_version="1",
)
def ranker(context: dg.AssetExecutionContext, config: Training, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute.learn import train_ranker

    with asset_span(context), larder.connect() as connection:
        report = train_ranker(
            larder.lake,
            connection,
            larder.artifacts_url,
            larder.record.folder / "training",
            config=config.settings(),
            progress=progress(context),
        )
    losses = [(entry.epoch, entry.loss) for entry in report.progress if entry.stage == 1]
    quality = [
        (entry.epoch, entry.ndcg_at_10)
        for entry in report.progress
        if entry.stage == 1 and entry.ndcg_at_10 is not None
    ]

    def draw(axes: Any) -> None:
        axes.plot([epoch for epoch, _ in losses], [loss for _, loss in losses], color="#888", label="loss")
        axes.set_xlabel("epoch", fontsize=8)
        right = axes.twinx()
        right.plot(
            [epoch for epoch, _ in quality], [value for _, value in quality], "o-", color="#0a6", label="NDCG@10"
        )
        right.tick_params(labelsize=8)
        axes.figure.legend(fontsize=7, loc="upper right")

    return dg.MaterializeResult(
        metadata={
            metadata.SECONDS: report.seconds,
            "epochs": len(losses),
            **{f"validation_{name}": value for name, value in report.validation.items()},
            "events": report.events,
            "prompts": ", ".join((report.prompts.item, report.prompts.profile, report.prompts.wish)),
            "learning_curve": metadata.plot("Loss and validation NDCG@10", draw),
        }
    )


@dg.asset(
    group_name=GROUP,
    owners=[OWNER],
    kinds={"pytorch"},
    deps=["ranker"],
    description="How good the ranker is against counts, neighbours and matrix factorisation, on a leave-one-out and on a "
    "global time split; where it is good, what its lists are like, what its candidates hold, how it follows wishes.",
    code_version="2",
)
def ranker_evaluation(context: dg.AssetExecutionContext, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute.learn import RANKER, evaluate_ranker

    with asset_span(context), larder.connect() as connection:
        report = evaluate_ranker(larder.lake, connection, larder.artifacts_url, progress=progress(context))
        serving = connection.execute(
            "SELECT v.version, v.manifest->'quality' FROM model_aliases AS a JOIN model_versions AS v USING (version) "
            "WHERE a.alias = 'champion'"
        ).fetchone()
    champion = _champion(serving)

    def draw(axes: Any) -> None:
        names = [row.name for row in report.reports[0].evaluation.rows]
        for shift, found in zip((-0.2, 0.2), report.reports, strict=True):
            values = [found.evaluation.row(name).ndcg[10] for name in names]
            axes.barh([place + shift for place in range(len(names))], values, height=0.38, label=found.evaluation.split)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.legend(fontsize=7)

    numbers: dict[str, Any] = {}
    for key, found in zip(SPLITS, report.reports, strict=True):
        for row in found.evaluation.rows:
            numbers[f"{key}_{row.name.replace(' ', '_').replace('-', '_')}_ndcg_at_10"] = row.ndcg[10]
        numbers[f"{key}_coverage_rate"] = found.beyond_accuracy[RANKER].coverage_rate
        if found.candidates is not None:
            numbers[f"{key}_candidate_recall"] = found.candidates.union
    if report.following is not None:
        numbers["wish_weight"] = report.following.wish_weight
        numbers["genre_lift"] = report.following.genre_lift
    return dg.MaterializeResult(
        metadata={
            **numbers,
            **{f"champion_{name}": value for name, value in champion.items()},
            metadata.SECONDS: report.seconds,
            **{
                key: dg.MetadataValue.md(f"```\n{found.tables()}\n```")
                for key, found in zip(SPLITS, report.reports, strict=True)
            },
            "wishes": metadata.markdown_table(
                ["weight", "genre lift, wish alone", "validation NDCG@10 with a wish"],
                [
                    [f"{row.weight:g}", f"{row.genre_lift:.2f}", f"{row.ndcg_at_10:.4f}"]
                    for row in (report.following.rows if report.following else ())
                ],
            ),
            "comparison": metadata.plot("NDCG@10", draw),
        }
    )


def _champion(serving: tuple[str, dict[str, Any]] | None) -> dict[str, Any]:
    """What stood in the serving model's manifest when it was released, on the days it was judged by."""
    if serving is None:
        return {"version": "none: the floor serves"}
    version, quality = serving
    found: dict[str, Any] = {"version": version}
    for key in SPLITS:
        for row in quality.get(key, {}).get("rows", ()):
            if row["name"] == "ranker":
                found[f"{key}_ndcg_at_10"] = row["ndcg"]["10"]
    return found


@dg.asset(
    group_name=GROUP,
    owners=[OWNER],
    kinds={"onnx"},
    deps=["ranker", "ranker_evaluation", "popular_items"],
    description="The ranker exported and quantised by Optimum, compared with PyTorch over a sweep of shapes, with its "
    "manifest and its gate record.",
    code_version="1",
)
def ranker_onnx(context: dg.AssetExecutionContext, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute import learning_steps
    from orchestration.compute.learn import export_ranker

    with asset_span(context):
        start = time.monotonic()
        with larder.connect() as connection, tempfile.TemporaryDirectory(prefix="larder-artifact-") as scratch:
            folder, tell = Path(scratch) / "ranker", progress(context)
            exported = export_ranker(larder.lake, connection, larder.artifacts_url, folder, progress=tell)
            version = exported.manifest.version
            path = f"models/ranker/{version}"
            artifacts.publish(larder.artifacts_url, path, folder)
            registry.register(connection, exported.manifest, path)
            registry.record_gate(connection, version, exported.passed, exported.record)
        learning_steps.done(larder.artifacts_url, exported.training_set, "ranker_onnx")
    for line in exported.words:
        progress(context)(line)
    return dg.MaterializeResult(
        metadata={
            "model_version": version,
            "gate_passed": exported.passed,
            "gate": dg.MetadataValue.md("\n".join(f"- {line}" for line in exported.words)),
            **{f"{name}_ms": value for name, value in exported.manifest.latency_ms.items() if name.endswith("p50")},
            **{f"int8_{name}": value for name, value in exported.manifest.parity["int8"].items() if value is not None},
            "wish_weight": exported.manifest.wish_weight,
            "size_bytes": sum(entry.size_bytes for entry in exported.manifest.files.values()),
            "manifest": dg.MetadataValue.json(json.loads(exported.manifest.to_json())),
            metadata.SECONDS: time.monotonic() - start,
        }
    )
