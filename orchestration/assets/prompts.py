"""The asset of prompt templates: each version a partition, judged side by side, the best of each kind recorded."""

from typing import Any

import dagster as dg

from inference import artifacts
from inference.encoder import TextEncoder
from orchestration import metadata
from orchestration.assets.embeddings import item_encoder
from orchestration.metadata import OWNER, column_schema
from orchestration.progress import progress
from orchestration.ranges import asset_span
from orchestration.resources import Larder
from schemas import prompts, tables
from schemas.manifest import ENCODER_PATH

TEMPLATES = dg.StaticPartitionsDefinition(list(prompts.versions()))


@dg.asset(
    group_name="embeddings",
    owners=[OWNER],
    kinds={"postgres"},
    deps=["items", dg.AssetDep("events", partition_mapping=dg.AllPartitionMapping())],
    partitions_def=TEMPLATES,
    backfill_policy=dg.BackfillPolicy.single_run(),
    description="Each prompt template judged on cold items and on how far lists follow a wish, beside the others of its kind. "
    "The best of a kind is recorded and used from the next encoding and training on; until all are judged, the one in use "
    "stays.",
    metadata=column_schema(tables.prompt_evaluations),
    code_version="1",
)
def prompt_evaluation(context: dg.AssetExecutionContext, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute.prompt_evaluation import evaluate_template, load_prompt_data
    from orchestration.compute.prompt_records import read_versions

    with asset_span(context), larder.connect() as connection:
        encoder = item_encoder(larder)
        wish_encoder = TextEncoder(artifacts.fetch(larder.artifacts_url, ENCODER_PATH), precision="int8")
        data = load_prompt_data(larder.lake, connection)
        # Read once: the templates of a run are judged beside the same versions of the other kinds.
        base = read_versions(connection)
        connection.commit()
        reports = {}
        for version in context.partition_keys:
            reports[version] = evaluate_template(connection, data, version, base, encoder, wish_encoder)
            progress(context)(reports[version].words())
    # Each page shows its whole kind: what was judged later in this run as well.
    newest = {report.kind: report for report in reports.values()}
    for version, report in reports.items():
        context.add_asset_metadata(_page(report, newest[report.kind]), partition_key=version)
    return dg.MaterializeResult()


def _page(report: Any, newest: Any) -> dict[str, Any]:
    from orchestration.compute.prompt_evaluation import DECIDES

    decides = DECIDES[report.kind]
    columns = ("cold_item_recall", "neighbours_recall", "warm_recall", "genre_lift", "genre_lift_with_history")
    used = newest.winner or newest.current

    def draw(axes: Any) -> None:
        names = [row.version for row in newest.rows]
        axes.barh(
            names,
            [row.figures[decides] for row in newest.rows],
            color=["#0a6" if name == used else "#999" for name in names],
        )
        axes.invert_yaxis()

    return {
        **report.figures.numbers(),
        "used": used,
        "outcome": newest.words() if report is newest else report.words(),
        "side_by_side": metadata.markdown_table(
            ["template", *(name.replace("_", " ") for name in columns), "description"],
            [
                [
                    f"**{row.version}**" if row.version == used else row.version,
                    *(f"{row.figures[name]:.3f}" for name in columns),
                    prompts.load(row.version).description,
                ]
                for row in newest.rows
            ],
        ),
        "comparison": metadata.plot(decides.replace("_", " "), draw),
    }
