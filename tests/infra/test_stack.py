"""What CloudFormation and Lambda say when things go wrong, which moto does not: by botocore's stubs, which check both sides."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import boto3
import pytest
from botocore.stub import ANY, Stubber

from infra.aws import stack as stacks
from infra.aws.function import Function, roll_back
from infra.aws.stack import Stack
from schemas.errors import DeployError

PARAMETERS = {"Name": "larder-shop"}
CHANGE_SET = {"StackName": "larder-shop", "ChangeSetName": ANY}


def described(status: str, **more: Any) -> dict[str, Any]:
    stack = {"StackName": "larder-shop", "StackStatus": status, "CreationTime": datetime.now(UTC), **more}
    return {"Stacks": [stack]}


@pytest.fixture
def cloudformation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubber]:
    monkeypatch.setattr(stacks, "POLL_SECONDS", 0.001)
    client = boto3.client("cloudformation", "eu-central-1", aws_access_key_id="a", aws_secret_access_key="b")
    with Stubber(client) as stubber:
        yield stubber
        stubber.assert_no_pending_responses()


def stack_of(stubber: Stubber) -> Stack:
    return Stack(stubber.client, "larder-shop")


def refuse_change(stubber: Stubber, status: str, reason: str) -> None:
    stubber.add_response("describe_change_set", {"Status": status, "StatusReason": reason}, CHANGE_SET)


def test_a_stack_that_was_never_complete_is_named_with_the_way_out(cloudformation: Stubber) -> None:
    cloudformation.add_response("describe_stacks", described("ROLLBACK_COMPLETE"))
    event = {
        "StackId": "s",
        "EventId": "e",
        "StackName": "larder-shop",
        "Timestamp": datetime.now(UTC),
        "ResourceStatus": "CREATE_FAILED",
        "LogicalResourceId": "Role",
        "ResourceStatusReason": "not authorized",
    }
    cloudformation.add_response("describe_stack_events", {"StackEvents": [event]})
    with pytest.raises(DeployError, match=r"Role: not authorized.*delete-stack --stack-name larder-shop"):
        stack_of(cloudformation).apply(PARAMETERS, print)


def test_a_failed_update_gives_the_first_reason(cloudformation: Stubber) -> None:
    for _ in range(2):
        cloudformation.add_response("describe_stacks", described("UPDATE_COMPLETE"))
    cloudformation.add_response("create_change_set", {"Id": "arn:aws:cloudformation:x:1:changeSet/x"})
    cloudformation.add_response("describe_change_set", {"Status": "CREATE_IN_PROGRESS"}, CHANGE_SET)
    change = {"Action": "Modify", "ResourceType": "AWS::Lambda::Function", "LogicalResourceId": "Function"}
    cloudformation.add_response(
        "describe_change_set",
        {"Status": "CREATE_COMPLETE", "Changes": [{"ResourceChange": {**change, "Replacement": "Conditional"}}]},
        CHANGE_SET,
    )
    cloudformation.add_response("execute_change_set", {}, CHANGE_SET)
    cloudformation.add_response("describe_stacks", described("UPDATE_ROLLBACK_IN_PROGRESS"))
    cloudformation.add_response("describe_stacks", described("UPDATE_ROLLBACK_COMPLETE"))
    events = [
        {
            "StackId": "s",
            "EventId": f"e{name}",
            "StackName": "larder-shop",
            "Timestamp": datetime.now(UTC),
            "ResourceStatus": "UPDATE_FAILED",
            "LogicalResourceId": name,
            "ResourceStatusReason": reason,
        }
        for name, reason in (("Alarm", "cancelled"), ("Function", "the image does not exist"))  # newest first
    ]
    cloudformation.add_response("describe_stack_events", {"StackEvents": events})
    lines: list[str] = []
    with pytest.raises(DeployError, match=r"could not be updated \(UPDATE_ROLLBACK_COMPLETE\): Function: the image"):
        stack_of(cloudformation).apply(PARAMETERS, lines.append)
    assert "  modify AWS::Lambda::Function Function, perhaps replaced" in lines


def test_a_change_that_another_run_has_begun_is_waited_for(cloudformation: Stubber) -> None:
    cloudformation.add_response("describe_stacks", described("UPDATE_IN_PROGRESS"))
    parameters = [{"ParameterKey": "Name", "ParameterValue": "larder-shop"}]
    for _ in range(2):
        cloudformation.add_response("describe_stacks", described("UPDATE_COMPLETE", Parameters=parameters))
    body = stacks.TEMPLATE.read_text()
    cloudformation.add_response("get_template", {"TemplateBody": body})
    assert not stack_of(cloudformation).apply(PARAMETERS, print)


def test_a_change_set_that_an_interrupted_run_left_is_made_anew(cloudformation: Stubber) -> None:
    for _ in range(2):
        cloudformation.add_client_error(
            "describe_stacks", "ValidationError", "Stack with id larder-shop does not exist"
        )
    cloudformation.add_client_error("create_change_set", "AlreadyExistsException")
    cloudformation.add_response("delete_change_set", {}, CHANGE_SET)
    cloudformation.add_response("create_change_set", {"Id": "arn:aws:cloudformation:x:1:changeSet/x"})
    refuse_change(cloudformation, "FAILED", "Template error: no such thing")
    cloudformation.add_response("delete_change_set", {}, CHANGE_SET)
    with pytest.raises(DeployError, match="Template error: no such thing"):
        stack_of(cloudformation).apply(PARAMETERS, print)


def test_an_alias_that_somebody_moved_meanwhile_is_left_alone() -> None:
    client = boto3.client("lambda", "eu-central-1", aws_access_key_id="a", aws_secret_access_key="b")
    with Stubber(client) as stubber:
        alias = {"Name": "live", "FunctionVersion": "3", "Description": "version 3; before it 2", "RevisionId": "r1"}
        stubber.add_response("get_alias", alias)
        stubber.add_client_error(
            "update_alias",
            "PreconditionFailedException",
            expected_params={
                "FunctionName": "larder-shop",
                "Name": "live",
                "FunctionVersion": "2",
                "RoutingConfig": {"AdditionalVersionWeights": {}},
                "Description": "version 2; before it 3",
                "RevisionId": "r1",
            },
        )
        with pytest.raises(DeployError, match="somebody moved the alias live of larder-shop meanwhile"):
            roll_back(Function(client, None, "larder-shop"), print)


def test_the_first_version_has_nothing_before_it() -> None:
    client = boto3.client("lambda", "eu-central-1", aws_access_key_id="a", aws_secret_access_key="b")
    with Stubber(client) as stubber:
        stubber.add_response(
            "get_alias", {"Name": "live", "FunctionVersion": "1", "Description": "What callers reach."}
        )
        with pytest.raises(DeployError, match="version 1 of larder-shop is the first"):
            roll_back(Function(client, None, "larder-shop"), print)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"errorType": "Runtime.ExitError", "errorMessage": "exit status 1"}', "Runtime.ExitError: exit status 1"),
        (b'{"errorType": "KeyError", "errorMessage": "CANARY"}', "KeyError"),
        (b"no json", "no reason given"),
    ],
)
def test_a_function_that_dies_is_named_without_what_it_was_asked(body: bytes, told: str) -> None:
    import io

    client = boto3.client("lambda", "eu-central-1", aws_access_key_id="a", aws_secret_access_key="b")
    with Stubber(client) as stubber:
        stubber.add_response("invoke", {"StatusCode": 200, "FunctionError": "Unhandled", "Payload": io.BytesIO(body)})
        with pytest.raises(DeployError) as error:
            Function(client, None, "larder-shop").invoke("1", b"{}", {})
    assert str(error.value) == f"the function died (Unhandled): {told}"
