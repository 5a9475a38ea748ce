"""The running Dagster instance (the one `make ui` starts), spoken to through its GraphQL API; nothing else of ours does."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from schemas.errors import InstanceError

BACKFILL_TAG = "larder/backfill"
PART_TAG = "larder/backfill_part"
RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"
FINISHED = frozenset({"SUCCESS", "FAILURE", "CANCELED"})
_QUEUE_DAEMON = "QUEUED_RUN_COORDINATOR"
_TIMEOUT_SECONDS = 60
_LOGS_PER_CALL = 500


@dataclass(frozen=True, slots=True)
class DailyAsset:
    """A daily asset as the instance knows it: its partitions and the state of each that has one."""

    name: str
    first: date
    last: date
    state: dict[date, str]
    """MATERIALIZED, FAILED or MATERIALIZING; a day that is not here is missing."""
    location: tuple[str, str]
    """Repository and code location, which a launch must name."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a backfill."""

    run_id: str
    status: str
    backfill: str
    part: int
    assets: tuple[str, ...]
    first: date
    last: date


class InstanceApi:
    """GraphQL over HTTP. Every method raises InstanceError, with the way out, where the instance does not play along."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def call(self, query: str, **variables: Any) -> Any:
        """The `data` of one GraphQL request."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                answer = json.load(response)
        except (OSError, ValueError) as error:
            raise InstanceError(
                f"no Dagster instance answers at {self.url} ({error}); start it with `make ui` in another terminal, "
                "or name another with URL=http://host:port"
            ) from error
        if answer.get("errors"):
            raise InstanceError(f"{self.url} refused a query: {answer['errors'][0]['message']}")
        return answer["data"]

    def wait_for_daemon(self, seconds: float = 20) -> None:
        """Return once the daemon that starts queued runs beats; it does a few seconds after the UI is up."""
        end = time.monotonic() + seconds
        while True:
            health = self.call("{ instance { daemonHealth { allDaemonStatuses { daemonType healthy } } } }")
            daemons = health["instance"]["daemonHealth"]["allDaemonStatuses"]
            if any(daemon["daemonType"] == _QUEUE_DAEMON and daemon["healthy"] for daemon in daemons):
                return
            if time.monotonic() > end:
                raise InstanceError(
                    f"the instance at {self.url} has no daemon that starts queued runs; "
                    "`make ui` starts both, a webserver alone does not"
                )
            time.sleep(1)

    def daily_assets(self, names: Sequence[str]) -> dict[str, DailyAsset]:
        """The partitioned assets among `names`, with the state of every partition."""
        nodes = self.call(
            "query ($keys: [AssetKeyInput!]!) { assetNodes(assetKeys: $keys) { assetKey { path } "
            "partitionKeysByDimension { partitionKeys } repository { name location { name } } "
            "assetPartitionStatuses { ... on TimePartitionStatuses { ranges { status startKey endKey } } } } }",
            keys=[{"path": [name]} for name in names],
        )["assetNodes"]
        found = {}
        for node in nodes:
            keys = node["partitionKeysByDimension"][0]["partitionKeys"]
            name = node["assetKey"]["path"][0]
            if not keys:
                raise InstanceError(f"asset {name!r} has no partition yet: its first day has not ended")
            state: dict[date, str] = {}
            for part in node["assetPartitionStatuses"].get("ranges", []):
                first, last = date.fromisoformat(part["startKey"]), date.fromisoformat(part["endKey"])
                for offset in range((last - first).days + 1):
                    state[first + timedelta(days=offset)] = part["status"]
            repository = node["repository"]
            found[name] = DailyAsset(
                name,
                date.fromisoformat(keys[0]),
                date.fromisoformat(keys[-1]),
                state,
                (repository["name"], repository["location"]["name"]),
            )
        return found

    def launch(
        self, assets: Sequence[str], first: date, last: date, location: tuple[str, str], tags: dict[str, str]
    ) -> str:
        """Queue one run over a range of partitions; returns its id."""
        tags = tags | {RANGE_START_TAG: first.isoformat(), RANGE_END_TAG: last.isoformat()}
        result = self.call(
            "mutation ($params: ExecutionParams!) { launchRun(executionParams: $params) { __typename "
            "... on LaunchRunSuccess { run { runId } } ... on Error { message } } }",
            params={
                "selector": {
                    "repositoryName": location[0],
                    "repositoryLocationName": location[1],
                    "jobName": "__ASSET_JOB",
                    "assetSelection": [{"path": [name]} for name in assets],
                },
                "runConfigData": {},
                "mode": "default",
                "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in tags.items()]},
            },
        )["launchRun"]
        if result["__typename"] != "LaunchRunSuccess":
            raise InstanceError(f"Dagster did not launch the run: {result.get('message') or result['__typename']}")
        return str(result["run"]["runId"])

    def runs(self, backfill: str | None = None) -> list[Run]:
        """The runs of a backfill in their order; without an id, those of the backfill launched last. Empty: none."""
        tags = [{"key": BACKFILL_TAG, "value": backfill}] if backfill else []
        found = self.call(
            "query ($filter: RunsFilter) { runsOrError(filter: $filter, limit: 1000) { __typename ... on Runs { "
            "results { runId status tags { key value } assetSelection { path } } } } }",
            filter={"tags": tags},
        )["runsOrError"].get("results", [])
        runs = [_run(run) for run in found]
        ours = [run for run in runs if run is not None]
        if backfill is None and ours:
            ours = [run for run in ours if run.backfill == ours[0].backfill]
        return sorted(ours, key=lambda run: run.part)

    def events(self, run_id: str, cursor: str | None) -> tuple[list[dict[str, Any]], str | None]:
        """What the run logged since `cursor`, and the cursor to go on from."""
        page = self.call(
            "query ($id: ID!, $cursor: String, $limit: Int) { logsForRun(runId: $id, afterCursor: $cursor, limit: $limit) "
            "{ __typename ... on EventConnection { cursor events { __typename "
            "... on LogMessageEvent { message level stepKey } "
            "... on MaterializationEvent { assetKey { path } partition } "
            "... on ExecutionStepFailureEvent { stepKey error { message causes { message } } } "
            "... on RunFailureEvent { message } } } } }",
            id=run_id,
            cursor=cursor,
            limit=_LOGS_PER_CALL,
        )["logsForRun"]
        if page["__typename"] != "EventConnection":
            raise InstanceError(f"the run {run_id} is not known to the instance at {self.url}")
        return page["events"], page["cursor"]

    def terminate(self, run_id: str) -> str | None:
        """Ask a run to stop; None, or why it cannot."""
        result = self.call(
            "mutation ($id: String!) { terminateRun(runId: $id) { __typename ... on TerminateRunFailure { message } "
            "... on RunNotFoundError { message } ... on UnauthorizedError { message } ... on PythonError { message } } }",
            id=run_id,
        )["terminateRun"]
        return None if result["__typename"] == "TerminateRunSuccess" else str(result.get("message"))


def _run(raw: dict[str, Any]) -> Run | None:
    tags = {tag["key"]: tag["value"] for tag in raw["tags"]}
    if BACKFILL_TAG not in tags:
        return None
    return Run(
        raw["runId"],
        raw["status"],
        tags[BACKFILL_TAG],
        int(tags[PART_TAG]),
        tuple(sorted(key["path"][0] for key in raw["assetSelection"] or [])),
        date.fromisoformat(tags[RANGE_START_TAG]),
        date.fromisoformat(tags[RANGE_END_TAG]),
    )
