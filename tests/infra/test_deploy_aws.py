"""`make deploy` and `make rollback` on AWS: created, repeated, updated, shifted, rolled back, resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aws_double import AWS_ENVIRONMENT, AwsDouble, furnish, put_package, running_aws
from conftest import days_ago
from released_model import release_model
from smoke_app import SmokeApplication

from inference import telemetry
from inference.handlers.aws_lambda import create_handler
from infra import deploy, release
from infra.aws import stack as stacks
from infra.deployment import Deployment

FUNCTION = "larder-shop"


@dataclass
class Shop:
    """A deployment with a released model, and the cloud it goes to."""

    record: Deployment
    database: str
    bucket: str
    aws: AwsDouble
    lines: list[str]

    def release(self, seed: int) -> str:
        """Release another model; its version."""
        with psycopg.connect(self.database) as connection:
            version = release_model(connection, self.record.artifacts_url, seed)
            put_package(self.aws, release.read(connection, self.record.artifacts_url))
        return version

    def serve(self, *versions: str, model: str, **how: Any) -> None:
        """Let `versions` of the function answer with `model`."""
        for version in versions:
            self.aws.handlers[version] = create_handler(lambda: SmokeApplication(model, **how))

    def deploy(self) -> bool:
        self.lines.clear()
        return deploy.deploy(self.record, self.database, "aws", self.lines.append)[2]

    def live(self) -> tuple[str, dict[str, float]]:
        found = self.aws.client("lambda").get_alias(FunctionName=FUNCTION, Name="live")
        return found["FunctionVersion"], (found.get("RoutingConfig") or {}).get("AdditionalVersionWeights") or {}


@pytest.fixture
def shop(larder_home: Path, database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Shop]:
    record = Deployment("shop", None, days_ago(30).date())
    record.save()
    with running_aws() as aws:
        given = {"DATABASE_URL": database, "AWS_ENDPOINT_URL": aws.url, "LARDER_SMOKE_SECONDS": "1", **AWS_ENVIRONMENT}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(stacks, "POLL_SECONDS", 0.01)
        furnish(aws)
        yield Shop(record, database, "larder-shop", aws, [])


def test_the_first_deployment_creates_all_and_a_repeat_changes_nothing(shop: Shop) -> None:
    model = shop.release(1)
    shop.serve("1", model=model)
    assert shop.deploy()
    client = shop.aws.client("lambda")
    made = client.get_function(FunctionName=FUNCTION)["Configuration"]
    assert made["Role"].endswith(f":role/{FUNCTION}-function")
    assert made["Environment"]["Variables"]["ARTIFACTS_URL"] == "s3://larder-shop/shop"
    assert made["Environment"]["Variables"]["LARDER_CONSENT_DEFAULT"] == "yes"
    role = shop.aws.client("iam").get_role(RoleName=f"{FUNCTION}-function")["Role"]
    assert role["AssumeRolePolicyDocument"]["Statement"][0]["Principal"] == {"Service": "lambda.amazonaws.com"}
    keys = {one["Key"] for one in shop.aws.client("s3").list_objects_v2(Bucket=shop.bucket)["Contents"]}
    assert {f"shop/models/ranker/{model}/manifest.json", "shop/models/champion.json"} <= keys
    assert shop.live()[1] == {}
    shop.aws.writes()
    live = shop.live()
    assert not shop.deploy()
    # Publishing what did not change gives the version that is there.
    assert [call for call in shop.aws.writes() if "/versions" not in call] == []
    assert shop.live() == live
    assert any("answers: 3 items" in line for line in shop.lines)


def test_a_new_model_becomes_a_new_version_and_rolling_back_returns_to_the_one_before(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    first = shop.release(1)
    shop.serve("1", model=first)
    shop.deploy()
    before = shop.live()[0]
    second = shop.release(2)
    shop.serve("2", model=second)
    assert shop.deploy()
    assert shop.live() == ("2", {})
    assert any("answers 10% of the requests" in line for line in shop.lines)
    assert deploy.main(["rollback", "--what", "function"]) == 0
    assert shop.live() == (before, {})
    assert f"version {before} answers again" in capsys.readouterr().out
    # What was rolled back is deployed again without anything being built.
    shop.aws.writes()
    assert shop.deploy()
    assert shop.live() == ("2", {})
    assert not [call for call in shop.aws.writes() if "ChangeSet" in call or call.startswith("PUT /larder-shop")]


def test_weights_move_before_all_requests_do(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LARDER_CANARY_RATE", "0.25")
    first = shop.release(1)
    shop.serve("1", model=first)
    shop.deploy()
    before = shop.live()[0]
    seen: list[tuple[str, dict[str, float]]] = []

    def watched(*_: Any) -> None:
        seen.append(shop.live())

    monkeypatch.setattr("infra.aws.function._watch", watched)
    second = shop.release(2)
    shop.serve("2", model=second)
    shop.deploy()
    assert seen == [(before, {"2": 0.25})]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"items": 0}, "answered with an empty list"),
        ({"degraded": ("database",)}, "answers without database"),
        ({"fails": True}, "answered with an error"),
    ],
)
def test_a_version_that_fails_its_smoke_test_never_gets_a_request(
    shop: Shop, how: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = shop.release(1)
    shop.serve("1", model=first)
    shop.deploy()
    live = shop.live()
    second = shop.release(2)
    shop.serve("2", model=second, **how)
    assert deploy.main(["deploy"]) == 1
    told = capsys.readouterr().err
    assert f"version 2 failed its smoke test: it {reason}" in told
    assert shop.live() == live


def test_a_version_that_breaks_once_all_requests_reach_it_is_taken_back(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    first = shop.release(1)
    shop.serve("1", model=first)
    shop.deploy()
    live = shop.live()
    second = shop.release(2)
    shop.serve("2", model=second, breaks_after=2)
    assert deploy.main(["deploy"]) == 1
    assert f"the alias live is back at version {live[0]}" in capsys.readouterr().err
    assert shop.live() == live


def test_errors_among_the_first_requests_take_a_version_back(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    first = shop.release(1)
    shop.serve("1", model=first)
    shop.deploy()
    live = shop.live()
    names = {"FunctionName": FUNCTION, "Resource": f"{FUNCTION}:live", "ExecutedVersion": "2"}
    shop.aws.client("cloudwatch").put_metric_data(
        Namespace="AWS/Lambda",
        MetricData=[
            {
                "MetricName": "Errors",
                "Dimensions": [{"Name": name, "Value": value} for name, value in names.items()],
                "Timestamp": datetime.now(UTC),
                "Value": 2,
            }
        ],
    )
    second = shop.release(2)
    shop.serve("2", model=second)
    assert deploy.main(["deploy"]) == 1
    assert "version 2 failed 2 of the requests that it was given" in capsys.readouterr().err
    assert shop.live() == live


def test_an_interrupted_deployment_goes_on_where_it_stopped(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = shop.release(1)
    shop.serve("1", model=first)
    shop.deploy()
    before = shop.live()[0]
    second = shop.release(2)
    shop.serve("2", model=second)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("infra.aws.function._watch", interrupted)
        assert deploy.main(["deploy"]) == 130
    assert "`make rollback WHAT=function` takes it back" in capsys.readouterr().err
    assert shop.live() == (before, {"2": 0.1})
    shop.aws.writes()
    assert shop.deploy()
    assert shop.live() == ("2", {})
    assert not [call for call in shop.aws.writes() if "ChangeSet" in call]


def test_rolling_back_an_interrupted_deployment_takes_its_share_away(shop: Shop) -> None:
    first = shop.release(1)
    shop.serve("1", model=first)
    shop.deploy()
    before = shop.live()[0]
    shop.aws.client("lambda").update_alias(
        FunctionName=FUNCTION, Name="live", RoutingConfig={"AdditionalVersionWeights": {"1": 0.1}}
    )
    assert deploy.main(["rollback", "--what", "function"]) == 0
    assert shop.live() == (before, {})


def test_a_rotated_secret_is_a_change(shop: Shop) -> None:
    model = shop.release(1)
    shop.serve("1", "2", model=model)
    shop.deploy()
    assert not shop.deploy()
    shop.aws.client("secretsmanager").put_secret_value(
        SecretId="shop/database", SecretString="postgresql://function:NEW@db/shop"
    )
    assert shop.deploy()
    assert shop.live()[0] == "2"


def test_a_plan_tells_everything_and_changes_nothing(
    shop: Shop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shop.release(1)
    shop.serve("1", model=first)
    shop.aws.writes()
    assert deploy.main(["deploy", "--plan"]) == 0
    told = capsys.readouterr().out
    assert "create the stack larder-shop" in told
    assert "AWS::IAM::Role Role" in told
    assert "costs about $" in told
    assert "CANARY" not in told
    assert shop.aws.writes() == []
    assert "larder-shop" not in shop.aws.templates
    shop.deploy()
    monkeypatch.setenv("LARDER_FUNCTION_MEMORY_MB", "2048")
    before = shop.live()
    capsys.readouterr()
    assert deploy.main(["deploy", "--plan"]) == 0
    told = capsys.readouterr().out
    assert "set MemoryMb: 1769 → 2048" in told
    assert f"move the alias live from version {before[0]}" in told
    assert shop.live() == before
    monkeypatch.delenv("LARDER_FUNCTION_MEMORY_MB")
    assert deploy.main(["deploy", "--plan"]) == 0
    assert "nothing to change" in capsys.readouterr().out


def test_the_smoke_request_hangs_under_the_deployments_trace(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shop.release(1)
    shop.serve("1", model=model)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with telemetry.span("release", carrier={"traceparent": parent}):
        shop.deploy()
    assert shop.aws.carriers
    assert all(carrier["traceparent"].split("-")[1] == parent.split("-")[1] for carrier in shop.aws.carriers)


def test_faults_name_the_way_out(
    shop: Shop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> str:
        assert deploy.main(["deploy"]) == 1
        return capsys.readouterr().err

    assert "no model is released yet" in told()
    shop.release(1)
    with monkeypatch.context() as patch:
        patch.delenv("AWS_DEFAULT_REGION")
        patch.delenv("AWS_REGION", raising=False)
        assert "no AWS region is set; set AWS_REGION" in told()
        patch.setenv("AWS_REGION", "eu-central-1")
        assert deploy.main(["deploy", "--plan"]) == 0
        assert "region eu-central-1" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        patch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        assert "no AWS credentials" in told()
    with monkeypatch.context() as patch:
        patch.setenv("LARDER_DATABASE_SECRET", "shop/nothing")
        assert "there is no secret 'shop/nothing'" in told()
    with monkeypatch.context() as patch:
        patch.setenv("LARDER_DEPLOY_URL", "s3://no-such-bucket/shop")
        assert "there is no bucket no-such-bucket" in told()
    with monkeypatch.context() as patch:
        patch.delenv("LARDER_DEPLOY_URL")
        patch.delenv("LARDER_DATABASE_SECRET")
        patch.setenv("LARDER_DOOR", "window")
        message = told()
        for fault in ("set LARDER_DEPLOY_URL to s3://", "LARDER_DATABASE_SECRET is not set", "LARDER_DOOR is 'window'"):
            assert fault in message
    assert (
        "there is no function larder-shop"
        in (deploy.main(["rollback", "--what", "function"]), capsys.readouterr().err)[1]
    )


def test_rolling_back_before_the_first_run_says_what_to_do(
    larder_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    assert deploy.main(["rollback"]) == 1
    assert f"there is no deployment in {larder_home}: run `make run` first" in capsys.readouterr().err
    assert not larder_home.exists()


def test_rolling_back_the_model_returns_to_the_champion_before(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy.main(["rollback"]) == 1
    assert "no model is released" in capsys.readouterr().err
    first = shop.release(1)
    assert deploy.main(["rollback"]) == 1
    assert f"older than the champion {first}" in capsys.readouterr().err
    second = shop.release(2)
    assert deploy.main(["rollback"]) == 0
    assert f"model {first} serves again, {second} no longer" in capsys.readouterr().out
    pointer = Path(shop.record.artifacts_url.removeprefix("file://")) / "models" / "champion.json"
    assert json.loads(pointer.read_text())["version"] == first
    assert deploy.main(["rollback", "--version", second]) == 0
    with psycopg.connect(shop.database) as connection:
        assert release.read(connection, shop.record.artifacts_url).version == second
