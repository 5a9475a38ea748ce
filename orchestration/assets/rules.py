"""What the deployment's rules cost, beside what diversity does."""

from dataclasses import asdict
from typing import Any

import dagster as dg

from orchestration import metadata
from orchestration.metadata import OWNER
from orchestration.progress import progress
from orchestration.ranges import asset_span
from orchestration.resources import Larder


@dg.asset(
    group_name="ranker",
    owners=[OWNER],
    kinds={"pytorch"},
    deps=["ranker_evaluation"],
    description="The price of each rule in rules.toml, and of diversity, in NDCG@10 of the ranker on the evaluation's held-out "
    "labels: the same scores re-ranked with one rule at a time, and with all.",
    code_version="1",
)
def rule_prices(context: dg.AssetExecutionContext, larder: Larder) -> dg.MaterializeResult[Any]:
    from inference.rules import read_rules
    from orchestration.compute.rule_prices import price_rules

    rules = read_rules(larder.record.rules)
    with asset_span(context), larder.connect() as connection:
        report = price_rules(larder.lake, connection, larder.artifacts_url, rules)
    progress(context)(report.table())

    def draw(axes: Any) -> None:
        places = range(len(report.rows))
        low = [row.price.mean - row.price.low for row in report.rows]
        high = [row.price.high - row.price.mean for row in report.rows]
        axes.barh(places, [row.price.mean for row in report.rows], xerr=[low, high], color="#0a6")
        axes.set_yticks(places, [row.rule for row in report.rows])
        axes.invert_yaxis()
        axes.axvline(0, color="#888", linewidth=0.8)

    return dg.MaterializeResult(
        metadata={
            "labels": report.labels,
            "ndcg_at_10": report.ndcg_at_10,
            **{f"price_{row.rule.replace('.', '_').replace(' ', '_')}": row.price.mean for row in report.rows},
            "prices": dg.MetadataValue.md(f"```\n{report.table()}\n```"),
            "figures": dg.MetadataValue.json([asdict(row) for row in report.rows]),
            "plot": metadata.plot("NDCG@10 given up", draw),
        }
    )
