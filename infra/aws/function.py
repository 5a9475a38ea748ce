"""Versions of the function and the alias that callers reach: publish, move by weights, smoke-test, roll back."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from botocore.exceptions import ClientError

from infra import smoke
from infra.release import Progress
from schemas.errors import DeployError

ALIAS = "live"
_BEFORE = re.compile(r"before it (\d+)")


@dataclass(frozen=True, slots=True)
class Live:
    """Where the alias points: `version` answers all requests but those that `weights` gives to others.

    `before` is the version that a roll-back returns to, None if there was none.
    """

    version: str
    weights: Mapping[str, float]
    before: str | None
    revision_id: str
    description: str


class Function:
    """The function `name`; `client` is boto3's for Lambda, `metrics` the one for CloudWatch.

    `key` is the request key that its smoke test sends, where the function asks direct invocations for one.
    """

    def __init__(self, client: Any, metrics: Any, name: str, key: str = "") -> None:
        self._key = key
        self._client = client
        self._metrics = metrics
        self.name = name

    def live(self) -> Live | None:
        """The alias, or None if the function or its alias does not exist."""
        try:
            found = self._client.get_alias(FunctionName=self.name, Name=ALIAS)
        except ClientError as error:
            if error.response["Error"]["Code"] == "ResourceNotFoundException":
                return None
            raise
        description = found.get("Description", "")
        before = _BEFORE.search(description)
        weights = (found.get("RoutingConfig") or {}).get("AdditionalVersionWeights") or {}
        return Live(
            found["FunctionVersion"], weights, before[1] if before else None, found.get("RevisionId", ""), description
        )

    def newest(self) -> str | None:
        """The version that was published last, or None."""
        pages = self._client.get_paginator("list_versions_by_function").paginate(FunctionName=self.name)
        numbers = [int(one["Version"]) for page in pages for one in page["Versions"] if one["Version"] != "$LATEST"]
        return str(max(numbers)) if numbers else None

    def publish(self, description: str) -> str:
        """The version that holds the function's code and configuration of now; an unchanged function keeps its last one."""
        self._client.get_waiter("function_updated_v2").wait(FunctionName=self.name)
        version = str(self._client.publish_version(FunctionName=self.name, Description=description)["Version"])
        self._client.get_waiter("published_version_active").wait(FunctionName=self.name, Qualifier=version)
        return version

    def invoke(self, qualifier: str, payload: bytes, carrier: Mapping[str, str]) -> bytes:
        """The answer of version or alias `qualifier`, as a direct invocation under the trace in `carrier`.

        Raises DeployError if the function died instead of answering.
        """
        custom = {**carrier, **({"authorization": f"Bearer {self._key}"} if self._key else {})}
        context = base64.b64encode(json.dumps({"custom": custom}).encode()).decode()
        done = self._client.invoke(
            FunctionName=self.name,
            Qualifier=qualifier,
            InvocationType="RequestResponse",
            ClientContext=context,
            Payload=payload,
        )
        body = bytes(done["Payload"].read())
        if done.get("FunctionError"):
            raise DeployError(f"the function died ({done['FunctionError']}): {_died_of(body)}")
        return body

    def test(
        self, qualifier: str, model_version: str, patience_seconds: float, carrier: Mapping[str, str]
    ) -> smoke.Answer:
        """The smoke test of `qualifier`. Raises DeployError if it fails."""
        what = f"the alias {ALIAS}" if qualifier == ALIAS else f"version {qualifier}"
        return smoke.test(
            lambda payload: self.invoke(qualifier, payload, carrier), model_version, patience_seconds, what
        )

    def move(self, live: Live, version: str, weights: Mapping[str, float], description: str) -> Live:
        """Point the alias at `version` with `weights`, unless somebody moved it since `live` was read."""
        arguments: dict[str, Any] = {"RevisionId": live.revision_id} if live.revision_id else {}
        try:
            self._client.update_alias(
                FunctionName=self.name,
                Name=ALIAS,
                FunctionVersion=version,
                RoutingConfig={"AdditionalVersionWeights": dict(weights)},
                Description=description,
                **arguments,
            )
        except ClientError as error:
            if error.response["Error"]["Code"] == "PreconditionFailedException":
                raise DeployError(
                    f"somebody moved the alias {ALIAS} of {self.name} meanwhile; look where it points, then deploy again"
                ) from error
            raise
        moved = self.live()
        assert moved is not None
        return moved

    def errors_of(self, version: str, since: datetime) -> int:
        """How many invocations of `version` through the alias failed since the instant `since`, as CloudWatch has it."""
        found = self._metrics.get_metric_statistics(
            Namespace="AWS/Lambda",
            MetricName="Errors",
            Dimensions=[
                {"Name": "FunctionName", "Value": self.name},
                {"Name": "Resource", "Value": f"{self.name}:{ALIAS}"},
                {"Name": "ExecutedVersion", "Value": version},
            ],
            StartTime=since - timedelta(minutes=1),
            EndTime=datetime.now(UTC) + timedelta(minutes=1),
            Period=60,
            Statistics=["Sum"],
        )
        return int(sum(point["Sum"] for point in found["Datapoints"]))


def shift(
    function: Function,
    version: str,
    model_version: str,
    *,
    canary_rate: float,
    canary_seconds: float,
    smoke_seconds: float,
    carrier: Mapping[str, str],
    progress: Progress,
) -> bool:
    """Let `version` answer: smoke test, a share of the requests for a while, all of them, smoke test through the alias.

    False if it answered all requests already; it is tested all the same. When a test fails, or the share's requests fail,
    the alias goes back to where it was and DeployError says why.
    """
    before = function.live()
    if before is None:
        raise DeployError(
            f"the function {function.name} has no alias {ALIAS}: its stack is not complete; look at the stack's events"
        )
    answer = function.test(version, model_version, smoke_seconds, carrier)
    progress(f"  version {version} answers: {told(answer)}")
    if before.version == version and not before.weights:
        return False
    now = before
    try:
        if canary_rate > 0 and before.version != version:
            now = function.move(now, before.version, {version: canary_rate}, before.description)
            progress(f"  version {version} answers {canary_rate:.0%} of the requests for {canary_seconds:g} s")
            _watch(function, version, canary_seconds, progress)
        description = f"version {version}" + (f"; before it {before.version}" if before.version != version else "")
        now = function.move(now, version, {}, description)
        function.test(ALIAS, model_version, smoke_seconds, carrier)
    except (DeployError, ClientError) as error:
        function.move(now, before.version, {}, before.description)
        raise DeployError(f"{error}; the alias {ALIAS} is back at version {before.version}") from error
    progress(f"  version {version} answers every request; before it {before.version}")
    return True


def roll_back(function: Function, progress: Progress) -> str:
    """Let the version before answer again; which one that is. Raises DeployError if there is none."""
    live = function.live()
    if live is None:
        raise DeployError(
            f"there is no function {function.name} with an alias {ALIAS} to roll back; `make deploy` first"
        )
    if live.weights:
        # A release that was interrupted on its way: what answered before still answers most.
        function.move(live, live.version, {}, live.description)
        progress(f"version {live.version} answers every request again")
        return live.version
    if live.before is None:
        raise DeployError(
            f"version {live.version} of {function.name} is the first that was deployed; nothing was before it"
        )
    function.move(live, live.before, {}, f"version {live.before}; before it {live.version}")
    progress(f"version {live.before} answers again; `make rollback WHAT=function` once more returns to {live.version}")
    return live.before


def told(answer: smoke.Answer) -> str:
    """A passed smoke test in words."""
    without = f", without {', '.join(answer.degraded)}" if answer.degraded else ""
    return (
        f"{answer.items} items from model {answer.model_version}{without}; first answer {answer.first_ms:.0f} ms, "
        f"next {answer.next_ms:.0f} ms"
    )


def _watch(function: Function, version: str, seconds: float, progress: Progress) -> None:
    since = datetime.now(UTC)
    until = time.monotonic() + seconds
    while True:
        failed = function.errors_of(version, since)
        if failed:
            raise DeployError(f"version {version} failed {failed} of the requests that it was given")
        left = until - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(10.0, left))


def _died_of(body: bytes) -> str:
    """Type of the error, and its message only for what the platform itself says: ours may quote a request."""
    try:
        told = json.loads(body)
    except ValueError:
        return "no reason given"
    kind = str(told.get("errorType", "no type given"))
    return f"{kind}: {told.get('errorMessage')}" if kind.startswith(("Runtime.", "Sandbox.")) else kind
