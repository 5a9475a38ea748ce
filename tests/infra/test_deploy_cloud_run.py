"""`make deploy TARGET=cloud-run`: a revision without traffic, its smoke test, the traffic, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cloud_run_double import CloudRunDouble, key_file, running_cloud_run
from conftest import days_ago
from released_model import release_model

from inference import telemetry
from infra import deploy
from infra.cloud_run import target
from infra.deployment import Deployment

SERVICE = "larder-shop"


@dataclass
class Shop:
    """A deployment with a released model, and the cloud it goes to."""

    record: Deployment
    database: str
    cloud: CloudRunDouble
    lines: list[str]

    def release(self, seed: int, **how: Any) -> str:
        with psycopg.connect(self.database) as connection:
            version = release_model(connection, self.record.artifacts_url, seed)
        self.cloud.behaviour[version] = how
        return version

    def deploy(self) -> bool:
        self.lines.clear()
        return deploy.deploy(self.record, self.database, "cloud-run", self.lines.append)[2]


@pytest.fixture
def shop(larder_home: Path, database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Shop]:
    record = Deployment("shop", None, days_ago(30).date())
    record.save()
    with running_cloud_run() as cloud:
        for name, value in {
            "DATABASE_URL": database,
            "GOOGLE_APPLICATION_CREDENTIALS": str(key_file(tmp_path, cloud.url)),
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_RUN": cloud.url,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER": cloud.url,
            "LARDER_DEPLOY_TARGET": "cloud-run",
            "LARDER_GOOGLE_PROJECT": "shop-project",
            "LARDER_GOOGLE_REGION": "europe-west1",
            "LARDER_GOOGLE_SERVICE_ACCOUNT": "larder@shop-project.iam.gserviceaccount.com",
            "LARDER_GOOGLE_BUCKET": "shop-artifacts",
            "LARDER_IMAGE": f"registry.example/shop/larder@sha256:{'a' * 64}",
            "LARDER_DATABASE_SECRET": "shop-database",
            "LARDER_CANARY_SECONDS": "0",
            "LARDER_SMOKE_SECONDS": "1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(target, "POLL_SECONDS", 0.01)
        yield Shop(record, database, cloud, [])


def test_the_first_deployment_creates_the_service_and_a_repeat_changes_nothing(shop: Shop) -> None:
    shop.release(1)
    assert shop.deploy()
    first = shop.cloud.answering(SERVICE)
    assert list(first.values()) == [100]
    container = shop.cloud.services[SERVICE]["spec"]["template"]["spec"]["containers"][0]
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" not in {one["name"] for one in container["env"]}
    shop.cloud.writes()
    assert not shop.deploy()
    assert shop.cloud.writes() == []
    assert shop.cloud.answering(SERVICE) == first


def test_a_new_model_gets_a_share_then_all_and_rolling_back_returns(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.release(1)
    shop.deploy()
    (first,) = shop.cloud.answering(SERVICE)
    shop.release(2)
    shop.cloud.splits.clear()
    assert shop.deploy()
    (second,) = shop.cloud.answering(SERVICE)
    assert shop.cloud.splits == [{first: 100}, {first: 90, second: 10}, {second: 100}]
    assert deploy.main(["rollback", "--what", "function"]) == 0
    assert shop.cloud.answering(SERVICE) == {first: 100}
    assert f"{first} answers again" in capsys.readouterr().out
    assert shop.deploy()
    assert shop.cloud.answering(SERVICE) == {second: 100}
    assert len(shop.cloud.revisions) == 2


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"items": 0}, "an empty list"),
        ({"degraded": ("ranker",)}, "answers without ranker"),
        ({"fails": True}, "with an error"),
    ],
)
def test_a_revision_that_fails_its_smoke_test_gets_no_traffic(
    shop: Shop, how: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.release(1)
    shop.deploy()
    first = shop.cloud.answering(SERVICE)
    shop.release(2, **how)
    shop.cloud.splits.clear()
    assert deploy.main(["deploy"]) == 1
    told = capsys.readouterr().err
    assert reason in told
    assert f"the traffic is back at {next(iter(first))}" in told
    assert shop.cloud.splits == [first, first]


def test_a_revision_that_breaks_under_traffic_is_taken_back(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.release(1)
    shop.deploy()
    first = shop.cloud.answering(SERVICE)
    shop.release(2, breaks_after=3)
    assert deploy.main(["deploy"]) == 1
    assert "answers without ranker" in capsys.readouterr().err
    assert shop.cloud.answering(SERVICE) == first


def test_a_container_that_dies_is_named_and_the_next_try_is_another_revision(
    shop: Shop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.release(1)
    shop.deploy()
    (first,) = shop.cloud.answering(SERVICE)
    image = f"registry.example/shop/larder@sha256:{'b' * 64}"
    monkeypatch.setenv("LARDER_IMAGE", image)
    shop.cloud.broken_images.add(image)
    assert deploy.main(["deploy"]) == 1
    assert "cannot be started: the container died" in capsys.readouterr().err
    assert shop.cloud.answering(SERVICE) == {first: 100}
    shop.cloud.broken_images.clear()
    assert shop.deploy()
    (after,) = shop.cloud.answering(SERVICE)
    assert after.endswith("-2")


def test_an_interrupted_deployment_goes_on_where_it_stopped(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.release(1)
    shop.deploy()
    (first,) = shop.cloud.answering(SERVICE)
    shop.release(2)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target.CloudRun, "_watch", interrupted)
        assert deploy.main(["deploy"]) == 130
    assert sorted(shop.cloud.answering(SERVICE).values()) == [10, 90]
    assert shop.deploy()
    assert list(shop.cloud.answering(SERVICE).values()) == [100]
    assert first not in shop.cloud.answering(SERVICE)
    assert len(shop.cloud.revisions) == 2


def test_a_rotated_secret_is_a_new_revision(shop: Shop) -> None:
    shop.release(1)
    shop.deploy()
    shop.cloud.secret_version = 2
    assert shop.deploy()
    assert len(shop.cloud.revisions) == 2


def test_a_plan_changes_nothing(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.release(1)
    assert deploy.main(["deploy", "--plan"]) == 0
    told = capsys.readouterr().out
    assert "create the service larder-shop" in told
    assert "costs about $" in told
    assert shop.cloud.services == {}
    shop.deploy()
    shop.release(2)
    shop.cloud.writes()
    assert deploy.main(["deploy", "--plan"]) == 0
    assert "move the traffic from larder-shop-" in capsys.readouterr().out
    assert shop.cloud.writes() == []


def test_the_smoke_request_carries_the_deployments_trace(shop: Shop) -> None:
    shop.release(1)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with telemetry.span("release", carrier={"traceparent": parent}):
        shop.deploy()
    assert shop.cloud.carriers
    assert all(carrier.split("-")[1] == parent.split("-")[1] for carrier in shop.cloud.carriers)


def test_the_function_is_told_what_holds_without_a_word_of_consent(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.release(1)
    for said in ("yes", "no"):
        monkeypatch.setenv("LARDER_CONSENT_DEFAULT", said)
        shop.deploy()
        container = shop.cloud.services[SERVICE]["spec"]["template"]["spec"]["containers"][0]
        told = {one["name"]: one.get("value") for one in container["env"]}
        assert told["LARDER_CONSENT_DEFAULT"] == said


def test_a_gpu_is_asked_for_as_google_describes_it(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LARDER_FUNCTION_GPU", "yes")
    shop.release(1)
    shop.deploy()
    spec = shop.cloud.services[SERVICE]["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"run.googleapis.com/accelerator": "nvidia-l4"}
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_faults_name_the_way_out(
    shop: Shop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.release(1)
    with monkeypatch.context() as patch:
        patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent.json")
        assert deploy.main(["deploy"]) == 1
        assert "no Google credentials" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setenv("LARDER_IMAGE", "registry.example/shop/larder:latest")
        patch.delenv("LARDER_GOOGLE_BUCKET")
        assert deploy.main(["deploy"]) == 1
        told = capsys.readouterr().err
        assert "name it by digest" in told
        assert "LARDER_GOOGLE_BUCKET is not set" in told
    with monkeypatch.context() as patch:
        patch.setenv("LARDER_DATABASE_SECRET", "nothing")
        assert deploy.main(["deploy"]) == 1
        assert "there is no secret 'nothing'" in capsys.readouterr().err
    assert deploy.main(["rollback", "--what", "function"]) == 1
    assert "no service larder-shop to roll back" in capsys.readouterr().err
