"""What a plan says a month costs, worked out by hand once."""

from __future__ import annotations

import pytest

from infra import costs
from infra.deploy_settings import DeploySettings
from schemas.errors import SettingsError


def test_a_million_requests_on_lambda() -> None:
    settings = DeploySettings("aws", "larder-shop", "s3://bucket/shop", memory_mb=2048)
    lines, assumed = costs.estimate(settings, {"LARDER_PLAN_MS": "50"})
    by_name = {line.what: line.dollars for line in lines}
    # 1 million × 0.05 s × (2 GB × 0.0000166667 + 0.5 GB × 0.0000000309)
    assert by_name["computing"] == pytest.approx(1.66744, abs=1e-5)
    assert by_name["requests"] == pytest.approx(0.20)
    assert "1 million requests of 50 ms" in assumed
    assert costs.PRICES_AS_OF in assumed


def test_prices_and_amounts_can_be_set() -> None:
    settings = DeploySettings("aws", "larder-shop", "s3://bucket/shop", door="http-api", events="yes")
    lines, assumed = costs.estimate(
        settings, {"LARDER_PLAN_REQUESTS": "2000000", "LARDER_PRICE_HTTP_API_MILLION_REQUESTS": "0.9"}
    )
    assert {line.what: line.dollars for line in lines}["HTTP API"] == pytest.approx(1.8)
    assert any(line.what == "queue" for line in lines)
    assert "1 of them set by you" in assumed
    with pytest.raises(SettingsError, match="LARDER_PLAN_MS is 'fast'"):
        costs.estimate(settings, {"LARDER_PLAN_MS": "fast"})


def test_a_gpu_is_paid_for_while_it_is_awake() -> None:
    settings = DeploySettings("cloud-run", "larder-shop", "", gpu="yes")
    lines, _ = costs.estimate(settings, {"LARDER_PLAN_GPU_HOURS": "10"})
    assert sum(line.dollars for line in lines) == pytest.approx(36_000 * (0.0001867 + 4 * 0.000018 + 16 * 0.000002))
