"""What happens after somebody edits `schemas/views.py`, in a process that starts with the edit; prints it as JSON.

`python tests/added_feature.py DEPLOYMENT LINE`: LINE becomes the last feature of `user_activity`, and a view of its own,
`user_taste`, is declared beside it.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

from edited_views import add_feature, install

VIEW = """
USER_TASTE = FeatureView(
    name="user_taste",
    entity=USER,
    owner="team:recommendations",
    description="What a person gave last.",
    ttl_days=3,
    features=(last_value("last_value_30d", 30),),
)

VIEWS: """


def edit(source: str) -> str:
    source = add_feature("user_activity", sys.argv[2])(source)
    source = source.replace("    last_seen,\n", "    last_seen,\n    last_value,\n", 1).replace("\nVIEWS: ", VIEW, 1)
    source = source.replace(" = (USER_ACTIVITY, ITEM_ACTIVITY,", " = (USER_ACTIVITY, USER_TASTE, ITEM_ACTIVITY,", 1)
    return source.replace(" = (USER_ACTIVITY,)", " = (USER_ACTIVITY, USER_TASTE)", 1)


install(edit)

import dagster as dg  # noqa: E402  # everything of ours is imported with the edit in place
import numpy as np  # noqa: E402
import psycopg  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from worlds import key_header, serving  # noqa: E402

from inference import artifacts, http  # noqa: E402
from inference.assemble import finish  # noqa: E402
from inference.ranker import Ranker  # noqa: E402
from inference.runtime import LarderApplication  # noqa: E402
from infra.feature_tables import ensure_view_tables  # noqa: E402
from infra.postgres import database_url  # noqa: E402
from orchestration.assets.features import VIEW_SPECS  # noqa: E402
from orchestration.compute.training_set import PATH  # noqa: E402
from orchestration.definitions import build_definitions  # noqa: E402
from orchestration.resources import Larder  # noqa: E402
from schemas.errors import ArtifactError, Unavailable  # noqa: E402
from schemas.views import VIEWS, candidate_features, context_features, fingerprint  # noqa: E402


def main() -> None:
    larder = Larder(deployment=sys.argv[1])
    url = database_url(larder.record)
    application = LarderApplication.from_settings(serving(url, larder.artifacts_url))
    with psycopg.connect(url) as connection:
        [(user,)] = connection.execute(
            # Who has had nearly all of so few items cannot be shown others.
            "SELECT user_id FROM user_history GROUP BY 1 HAVING count(*) BETWEEN 11 AND 60 "
            "AND max(occurred_at) FILTER (WHERE value IS NOT NULL) > now() - INTERVAL '9 days' ORDER BY max(occurred_at) DESC LIMIT 1"
        )
        [(old_model,)] = connection.execute("SELECT path FROM model_versions")

    headers = {"content-type": "application/json", **key_header(url)}

    def post(path: str, document: dict[str, Any]) -> dict[str, Any]:
        answer = http.handle(application, "POST", path, headers, json.dumps(document).encode(), deadline=None)
        return {"status": answer.status, **json.loads(answer.body)}

    def ask() -> dict[str, Any]:
        return post("/recommendations", {"user_id": user, "k": 3})

    event = {"event_id": "posted-1", "user_id": user, "item_id": "item-00001", "kind": "view"}
    told: dict[str, Any] = {"before_tables": ask(), "posted_before_tables": post("/events", {"events": [event]})}
    try:
        application.store.read_person(user, datetime.now(UTC), 5000, live=True)
    except Unavailable as error:
        told["read_before_tables"] = str(error)
    ensure_view_tables(url)  # as `make serve` does, see infra/serve.py
    told["after_tables"] = ask()

    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    days = {f"dagster/asset_partition_range_{end}": yesterday.isoformat() for end in ("start", "end")}
    with dg.DagsterInstance.ephemeral() as instance:
        job = build_definitions(larder).resolve_implicit_global_asset_job_def()
        for names, tags in (
            (["events", *(view.name for view in VIEWS)], days),
            (["popular_items", "co_visitation", "training_set"], {}),
            (["item_vectors"], {}),
        ):
            selected = [dg.AssetKey(name) for name in names]
            done = job.execute_in_process(instance=instance, asset_selection=selected, tags=tags)
    [made] = done.asset_materializations_for_node("item_vectors")
    told["item_vectors"] = {name: str(value.value) for name, value in made.metadata.items()}
    told["after_backfill"] = ask()

    now = datetime.now(UTC)
    read = application.store.read_person(user, now, 5000, live=True).views
    for view in VIEWS[:2]:
        columns = read[view.name]
        values, mask = finish(
            view, columns.states, at=np.array([now.timestamp()]), as_of=columns.as_of, present=np.ones(1, bool)
        )
        told[view.name] = {"value": float(values[0, -1]), "mask": float(mask[0, -1])}
    with psycopg.connect(url) as connection:
        [row] = connection.execute(
            "SELECT count(*), (array_agg(value ORDER BY occurred_at DESC, value DESC) FILTER (WHERE value IS NOT NULL))[1] "
            "FROM user_history WHERE user_id = %s AND occurred_at >= %s",
            (user, yesterday - timedelta(days=13)),
        )
        told["expected"] = row
        [(told["newest"],)] = connection.execute(
            "SELECT event_id FROM user_history WHERE user_id = %s ORDER BY occurred_at DESC LIMIT 1", (user,)
        )
        told["backfilled"] = connection.execute("SELECT count(n_14d) FROM features.user_activity").fetchone()
    try:
        Ranker(artifacts.fetch(larder.artifacts_url, old_model))
    except ArtifactError as error:
        told["old_model"] = str(error)
    specs = {spec.key.to_user_string(): spec for spec in VIEW_SPECS}
    told["columns"] = {
        name: [column.name for column in spec.metadata["dagster/column_schema"].schema.columns]  # type: ignore[union-attr]
        for name, spec in specs.items()
    }
    told["description"] = specs["user_activity"].description
    table = pq.read_table(artifacts.fetch(larder.artifacts_url, "training") / PATH.rpartition("/")[2])
    told["training_features"] = (table.schema.metadata or {})[b"features"].decode().split(",")
    told["training_width"] = table.schema.field("context").type.list_size
    told["context_features"], told["candidate_features"] = context_features(), candidate_features()
    told["fingerprint"] = fingerprint()
    application.close()
    print(json.dumps(told))


main()
