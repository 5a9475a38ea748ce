"""What inference/settings.py knows reaches a function in a cloud, or is named as not meant for one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from aws_double import AWS_ENVIRONMENT, AwsDouble, furnish, put_package, running_aws
from cloud_run_double import CloudRunDouble, key_file, running_cloud_run
from conftest import days_ago
from released_model import release_model
from smoke_app import SmokeApplication

from inference import artifacts
from inference.declared import Declared
from inference.handlers.aws_lambda import create_handler
from inference.rules import read_rules
from inference.settings import LIMITS, VARIABLES, Settings, read_settings
from infra import deploy, release
from infra.aws import stack as stacks
from infra.aws.template import load
from infra.cloud_run import target
from infra.deploy_settings import read_deploy_settings
from infra.deployment import Deployment
from infra.function_settings import NOT_FOR_THE_CLOUD, OF_THE_DEPLOYMENT, PLAIN, SECRETS
from schemas.errors import SettingsError

INFRA = Path(__file__).parents[2] / "infra"
RULES = "not_again_days = 3\n"
EXPERIMENTS = """
[experiments.one]
start = 2030-01-07T09:00:00Z
[experiments.one.arms.control]
share = 0.5
[experiments.one.arms.more]
share = 0.5
diversity = 0.4
"""
LLM = {
    "LARDER_LLM_URL": "https://llm.example/v1",
    "LARDER_LLM_MODEL": "small",
    "LARDER_LLM_TIMEOUT_MS": "500",
    "LARDER_EXPLORATION": "0.02",
}


@pytest.fixture
def record(larder_home: Path, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    for name in (*PLAIN, *SECRETS, *SECRETS.values(), "LARDER_RULES", "LARDER_EXPERIMENTS"):
        monkeypatch.delenv(name, raising=False)
    made = Deployment("shop", None, days_ago(30).date())
    made.save()
    return made


def test_every_setting_is_passed_or_named_as_not_meant_for_a_cloud() -> None:
    variables = VARIABLES | {setting: name for setting, (name, _, _) in LIMITS.items()}
    assert set(variables) == {field.name for field in dataclasses.fields(Settings)}
    known = [*SECRETS, *PLAIN, *OF_THE_DEPLOYMENT, *NOT_FOR_THE_CLOUD]
    assert sorted(known) == sorted(variables.values())


def test_the_templates_pass_every_one() -> None:
    passed = {*SECRETS, *PLAIN, *OF_THE_DEPLOYMENT}
    template = load((INFRA / "aws" / "function.yaml").read_text())
    assert passed <= set(template["Resources"]["Function"]["Properties"]["Environment"]["Variables"])
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    # There is no replica on one machine.
    assert passed - {"DATABASE_READ_URL"} <= set(compose["function"]["environment"])
    alike = {"LARDER_RULES", "LARDER_EXPERIMENTS", "LARDER_CONSENT_DEFAULT", *(name for name in PLAIN if "LLM" in name)}
    for name in alike:
        assert compose["code-server"]["environment"][name] == compose["function"]["environment"][name]
    for name in ("LARDER_LINK_KEYS", "LARDER_LOG_KEYS", "LARDER_LLM_KEY"):
        assert compose["function"]["environment"][name] == f"${{{name}:-}}"


def test_what_a_template_passes_empty_is_not_set() -> None:
    empty = dict.fromkeys((*PLAIN, "LARDER_RULES", "LARDER_EXPERIMENTS", "LARDER_LINK_KEYS", "LARDER_LOG_KEYS"), "")
    given = {"DATABASE_URL": "postgresql:///x", "ARTIFACTS_URL": "file:///x"}
    assert read_settings(given | empty) == read_settings(given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"LARDER_CANDIDATES": "many"}, "LARDER_CANDIDATES is 'many'; give a whole number"),
        ({"LARDER_LLM_URL": "https://llm.example/v1"}, "LARDER_LLM_MODEL is not set"),
        ({"LARDER_LLM_URL": "http://127.0.0.1:8000/v1", "LARDER_LLM_MODEL": "m"}, "which in a cloud is the function itself"),
        ({"LARDER_LLM_URL": "http://localhost:8000/v1", "LARDER_LLM_MODEL": "m"}, "which in a cloud is the function itself"),
        ({"LARDER_EXPERIMENTS": "experiments.toml"}, "put the file at s3://larder-shop/shop/declared/experiments.toml"),
        ({"LARDER_EXPERIMENTS": "s3://other/declared/x.toml"}, "cannot read LARDER_EXPERIMENTS, s3://other"),
        ({"LARDER_EXPERIMENTS": "s3://larder-shop/shop/declared/../x.toml"}, "cannot read LARDER_EXPERIMENTS"),
        ({"LARDER_RULES": "/nowhere.toml"}, "the rules in /nowhere.toml cannot be read"),
    ],
)  # fmt: skip
def test_what_a_function_could_not_use_is_not_deployed(record: Deployment, given: dict[str, str], told: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        with pytest.raises(SettingsError) as error:
            read_deploy_settings(record, "aws", AWS_ENVIRONMENT | given)
    assert told in str(error.value)


def test_rules_with_a_fault_are_not_deployed(record: Deployment) -> None:
    (record.folder / "rules.toml").write_text("nothing = 1")
    with pytest.raises(SettingsError, match="no rule 'nothing'"):
        read_deploy_settings(record, "aws", AWS_ENVIRONMENT)


@pytest.fixture
def aws(record: Deployment, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[AwsDouble]:
    with running_aws() as double:
        given = {"DATABASE_URL": database, "AWS_ENDPOINT_URL": double.url, "LARDER_SMOKE_SECONDS": "1"}
        for name, value in (given | AWS_ENVIRONMENT | LLM).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(stacks, "POLL_SECONDS", 0.01)
        furnish(double)
        with psycopg.connect(database) as connection:
            model = release_model(connection, record.artifacts_url, 1)
            put_package(double, release.read(connection, record.artifacts_url))
        for version in ("1", "2", "3"):
            double.handlers[version] = create_handler(lambda: SmokeApplication(model))
        yield double


def _told(aws: AwsDouble, version: str = "$LATEST") -> dict[str, str]:
    found = aws.client("lambda").get_function(FunctionName="larder-shop", Qualifier=version)
    told: dict[str, str] = found["Configuration"]["Environment"]["Variables"]
    return told


def _deploy(record: Deployment, database: str, where: Any = "aws") -> tuple[bool, list[str]]:
    lines: list[str] = []
    return deploy.deploy(record, database, where, lines.append)[2], lines


def test_a_function_on_aws_is_told_all_and_keeps_the_rules_of_its_version(
    aws: AwsDouble, record: Deployment, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "s3://larder-shop/shop/declared/experiments.toml"
    artifacts.put("s3://larder-shop/shop", "declared/experiments.toml", EXPERIMENTS.encode())
    monkeypatch.setenv("LARDER_EXPERIMENTS", place)
    secrets = aws.client("secretsmanager")
    for name, text in (("logs", f"a:{'CANARY' * 8}"), ("llm", "CANARY")):
        secrets.create_secret(Name=f"shop/{name}", SecretString=text)
    monkeypatch.setenv("LARDER_LOG_KEYS_SECRET", "shop/logs")
    monkeypatch.setenv("LARDER_LLM_KEY_SECRET", "shop/llm")
    (record.folder / "rules.toml").write_text(RULES)
    changed, lines = _deploy(record, database)
    assert changed
    told = _told(aws)
    assert {name: told[name] for name in LLM} == LLM
    assert told["LARDER_EXPERIMENTS"] == place
    assert "{{resolve:secretsmanager" in told["LARDER_LOG_KEYS"] or "CANARY" in told["LARDER_LOG_KEYS"]
    # It reads what it was told.
    assert read_rules(told["LARDER_RULES"]).not_again_days == 3
    (one,) = Declared(place).changed() or ()
    assert one.name == "one"
    # The record of what is over is there before anything is: a missing object would be refused, not missing.
    assert artifacts.get("s3://larder-shop/shop", "declared/experiments.stopped.json") == b"{}\n"
    stack = aws.client("cloudformation").describe_stacks(StackName="larder-shop")["Stacks"][0]
    assert "CANARY" not in json.dumps(stack["Parameters"]) + "".join(lines) + aws.templates["larder-shop"]
    aws.writes()
    assert not _deploy(record, database)[0]
    assert [call for call in aws.writes() if "declared" in call] == []
    # Other rules are another version; the one before keeps its own.
    first = told["LARDER_RULES"]
    (record.folder / "rules.toml").write_text("not_again_days = 4\n")
    assert _deploy(record, database)[0]
    assert read_rules(_told(aws)["LARDER_RULES"]).not_again_days == 4
    assert _told(aws, "1")["LARDER_RULES"] == first
    assert read_rules(first).not_again_days == 3


@pytest.fixture
def cloud_run(
    record: Deployment, database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[CloudRunDouble]:
    with running_cloud_run() as cloud:
        for name, value in (LLM | {
            "DATABASE_URL": database,
            "GOOGLE_APPLICATION_CREDENTIALS": str(key_file(tmp_path, cloud.url)),
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_RUN": cloud.url,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER": cloud.url,
            "LARDER_GOOGLE_PROJECT": "shop-project",
            "LARDER_GOOGLE_REGION": "europe-west1",
            "LARDER_GOOGLE_SERVICE_ACCOUNT": "larder@shop-project.iam.gserviceaccount.com",
            "LARDER_GOOGLE_BUCKET": "shop-artifacts",
            "LARDER_IMAGE": f"registry.example/shop/larder@sha256:{'a' * 64}",
            "LARDER_DATABASE_SECRET": "shop-database",
            "LARDER_CANARY_SECONDS": "0",
            "LARDER_SMOKE_SECONDS": "1",
        }).items():  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(target, "POLL_SECONDS", 0.01)
        with psycopg.connect(database) as connection:
            cloud.behaviour[release_model(connection, record.artifacts_url, 1)] = {}
        yield cloud


def test_a_service_on_cloud_run_is_told_all(
    cloud_run: CloudRunDouble, record: Deployment, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = record.folder / "artifacts"
    artifacts.put(record.artifacts_url, "declared/experiments.toml", EXPERIMENTS.encode())
    monkeypatch.setenv("LARDER_EXPERIMENTS", str(folder / "declared" / "experiments.toml"))
    for name in SECRETS.values():
        monkeypatch.setenv(name, f"shop-{name.lower().removeprefix('larder_').replace('_', '-')}")
    for name in PLAIN:
        monkeypatch.setenv(name, LLM.get(name, "100"))
    (record.folder / "rules.toml").write_text(RULES)
    assert _deploy(record, database, "cloud-run")[0]
    container = cloud_run.services["larder-shop"]["spec"]["template"]["spec"]["containers"][0]
    told = {one["name"]: one for one in container["env"]}
    assert len(told) == len(container["env"])
    assert set(told) >= {*SECRETS, *PLAIN, *OF_THE_DEPLOYMENT}
    for name in SECRETS:
        assert set(told[name]) == {"name", "valueFrom"}
    assert told["LARDER_LLM_URL"]["value"] == LLM["LARDER_LLM_URL"]
    assert told["LARDER_EXPERIMENTS"]["value"] == "/artifacts/declared/experiments.toml"
    rules = told["LARDER_RULES"]["value"]
    # The bucket is mounted where the service reads it.
    assert read_rules(rules.replace("/artifacts", str(folder), 1)).not_again_days == 3
    changed, lines = _deploy(record, database, "cloud-run")
    assert (changed, [line for line in lines if "not the function's" in line]) == (False, [])
    (record.folder / "rules.toml").write_text("not_again_days = 4\n")
    assert _deploy(record, database, "cloud-run")[0]
    assert len(cloud_run.revisions) == 2
    # What is declared for this machine alone is said to be.
    monkeypatch.delenv("LARDER_EXPERIMENTS")
    (record.folder / "experiments.toml").write_text(EXPERIMENTS)
    _, lines = _deploy(record, database, "cloud-run")
    assert "experiments.toml is not the function's: for experiments there, put it at" in lines[0]
    container = cloud_run.services["larder-shop"]["spec"]["template"]["spec"]["containers"][0]
    assert "LARDER_EXPERIMENTS" not in {one["name"] for one in container["env"]}
