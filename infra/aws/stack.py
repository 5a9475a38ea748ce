"""The CloudFormation stack of one function: what would change, and the change."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from infra.release import Progress
from schemas.errors import DeployError

TEMPLATE = Path(__file__).with_name("function.yaml")
POLL_SECONDS = 3.0
PATIENCE_SECONDS = 1_800.0

_SETTLED = ("CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE", "IMPORT_COMPLETE")
_ABSENT = ("REVIEW_IN_PROGRESS", "DELETE_COMPLETE")
"""A stack of which only a change set was ever made counts as not there."""


class Stack:
    """The stack `name`; `client` is boto3's for CloudFormation."""

    def __init__(self, client: Any, name: str) -> None:
        self._client = client
        self.name = name
        self._template = TEMPLATE.read_text(encoding="utf-8")

    def describe(self) -> dict[str, Any] | None:
        """What CloudFormation says of it, or None if it does not exist."""
        try:
            found = dict(self._client.describe_stacks(StackName=self.name)["Stacks"][0])
        except ClientError as error:
            if error.response["Error"]["Code"] == "ValidationError" and "does not exist" in str(error):
                return None
            raise
        return None if found["StackStatus"] in _ABSENT else found

    def outputs(self) -> dict[str, str]:
        """The stack's outputs by name; empty while it does not exist."""
        found = self.describe() or {}
        return {one["OutputKey"]: one["OutputValue"] for one in found.get("Outputs", ())}

    def is_as(self, parameters: Mapping[str, str]) -> bool:
        """Whether the stack was made from this template with `parameters`."""
        found = self.describe()
        if found is None or found["StackStatus"] not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
            return False
        given = {one["ParameterKey"]: one["ParameterValue"] for one in found.get("Parameters", ())}
        if any(given.get(name) != value for name, value in parameters.items()):
            return False
        body = self._client.get_template(StackName=self.name, TemplateStage="Original")["TemplateBody"]
        return bool((body if isinstance(body, str) else json.dumps(body)) == self._template)

    def changed_parameters(self, parameters: Mapping[str, str]) -> list[str]:
        """`name: before → after` for each parameter that differs from the stack's."""
        found = self.describe() or {}
        given = {one["ParameterKey"]: one["ParameterValue"] for one in found.get("Parameters", ())}
        return [
            f"{name}: {given.get(name) or 'unset'} → {value or 'unset'}"
            for name, value in parameters.items()
            if given.get(name) != value
        ]

    def preview(self, parameters: Mapping[str, str]) -> list[str]:
        """What an update would do, one resource a line, by a change set that is made and thrown away."""
        name = self._change_set(parameters, create=False)
        try:
            described = self._described(name)
            return [_shown(change["ResourceChange"]) for change in described.get("Changes", ())]
        finally:
            self._client.delete_change_set(StackName=self.name, ChangeSetName=name)

    def resources(self) -> list[str]:
        """`Type Name` of every resource that the template may create."""
        from infra.aws.template import load

        return [f"{resource['Type']} {name}" for name, resource in load(self._template)["Resources"].items()]

    def apply(self, parameters: Mapping[str, str], progress: Progress) -> bool:
        """Bring the stack to `parameters`; False if it was there already. Waits for a change that is under way.

        Raises DeployError with CloudFormation's first reason if it cannot.
        """
        found = self._settle(progress)
        if self.is_as(parameters):
            return False
        create = found is None
        name = self._change_set(parameters, create)
        described = self._described(name)
        if described["Status"] == "FAILED":
            self._client.delete_change_set(StackName=self.name, ChangeSetName=name)
            reason = described.get("StatusReason", "")
            if "didn't contain changes" in reason or "No updates are to be performed" in reason:
                return False
            raise DeployError(f"CloudFormation refuses the change of stack {self.name}: {reason}")
        for change in described.get("Changes", ()):
            progress(f"  {_shown(change['ResourceChange'])}")
        since = time.time()
        self._client.execute_change_set(StackName=self.name, ChangeSetName=name)
        after = self._settle(progress)
        if after is None or after["StackStatus"] not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
            status = after["StackStatus"] if after else "gone"
            raise DeployError(
                f"the stack {self.name} could not be {'created' if create else 'updated'} ({status}): {self._reason(since)}"
            )
        return True

    def _settle(self, progress: Progress) -> dict[str, Any] | None:
        """The stack once nothing is under way. Raises DeployError for a state that only a person can mend."""
        until = time.monotonic() + PATIENCE_SECONDS
        told = ""
        while True:
            found = self.describe()
            status = found["StackStatus"] if found else ""
            if found is None or status in _SETTLED:
                return found
            if not status.endswith("_IN_PROGRESS"):
                raise DeployError(
                    f"the stack {self.name} is {status} ({self._reason(0)}); mend it in the console, or, if it was never "
                    f"complete, remove it: aws cloudformation delete-stack --stack-name {self.name}"
                )
            if time.monotonic() > until:
                raise DeployError(
                    f"the stack {self.name} is still {status} after {PATIENCE_SECONDS / 60:.0f} minutes; look at its events, "
                    "then run this again: it goes on from there"
                )
            if status != told:
                progress(f"  stack {self.name}: {status.lower().replace('_', ' ')}")
                told = status
            time.sleep(POLL_SECONDS)

    def _change_set(self, parameters: Mapping[str, str], create: bool) -> str:
        content = json.dumps([self._template, dict(parameters)], sort_keys=True)
        name = f"larder-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        arguments: dict[str, Any] = {
            "StackName": self.name,
            "ChangeSetName": name,
            "ChangeSetType": "CREATE" if create else "UPDATE",
            "TemplateBody": self._template,
            "Parameters": [{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
            "Capabilities": ["CAPABILITY_NAMED_IAM"],
            "Tags": [{"Key": "larder", "Value": self.name}],
        }
        try:
            self._client.create_change_set(**arguments)
        except ClientError as error:
            if error.response["Error"]["Code"] != "AlreadyExistsException":
                raise
            # An interrupted run left it, and what it compares with may have changed since.
            self._client.delete_change_set(StackName=self.name, ChangeSetName=name)
            self._client.create_change_set(**arguments)
        return name

    def _described(self, name: str) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            described = dict(self._client.describe_change_set(StackName=self.name, ChangeSetName=name))
            if described["Status"] not in ("CREATE_PENDING", "CREATE_IN_PROGRESS") or time.monotonic() > until:
                return described
            time.sleep(POLL_SECONDS / 3)

    def _reason(self, since: float) -> str:
        """The first failure that CloudFormation recorded since the instant `since` (Unix seconds)."""
        events = self._client.describe_stack_events(StackName=self.name)["StackEvents"]
        failed = [
            event
            for event in events
            if event["ResourceStatus"].endswith("_FAILED") and event["Timestamp"].timestamp() >= since - 5
        ]
        if not failed:
            return "its events say no more"
        first = failed[-1]
        return f"{first['LogicalResourceId']}: {first.get('ResourceStatusReason', 'no reason given')}"


def _shown(change: Mapping[str, Any]) -> str:
    replaced = {"True": ", replaced", "Conditional": ", perhaps replaced"}.get(change.get("Replacement", ""), "")
    return f"{change['Action'].lower()} {change['ResourceType']} {change['LogicalResourceId']}{replaced}"
