"""What a deployed function costs to run in a month, by the prices below; every price and amount can be set.

Prices are the on-demand list prices without free tier, taxes and transfer, in US dollars, as the providers' pages had them
in the middle of 2025:

- AWS, us-east-1: https://aws.amazon.com/lambda/pricing/, https://aws.amazon.com/sqs/pricing/,
  https://aws.amazon.com/cloudwatch/pricing/, https://aws.amazon.com/api-gateway/pricing/
- Google Cloud Run, tier 1, billed by request (with a GPU by instance): https://cloud.google.com/run/pricing

They were not read again when this was run: set `LARDER_PRICE_<NAME>` (say LARDER_PRICE_LAMBDA_GB_SECOND=0.0000133334) to
what your region and contract say, and `LARDER_PLAN_REQUESTS` (a month), `LARDER_PLAN_MS` (per request) and
`LARDER_PLAN_GPU_HOURS` (a month with an instance awake) to what you expect.
The database, the machine that Dagster runs on and a collector are not in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from infra.deploy_settings import DeploySettings
from schemas.errors import SettingsError

PRICES_AS_OF = "2025-06"
PRICES: dict[str, float] = {
    "LAMBDA_GB_SECOND": 0.0000166667,
    "LAMBDA_MILLION_REQUESTS": 0.20,
    "HTTP_API_MILLION_REQUESTS": 1.00,
    "LAMBDA_EXTRA_STORAGE_GB_SECOND": 0.0000000309,
    "SQS_MILLION_REQUESTS": 0.40,
    "LOG_GB": 0.50,
    "ALARM_MONTH": 0.10,
    "SECRET_MONTH": 0.40,
    "CLOUD_RUN_VCPU_SECOND": 0.000024,
    "CLOUD_RUN_GIB_SECOND": 0.0000025,
    "CLOUD_RUN_MILLION_REQUESTS": 0.40,
    "CLOUD_RUN_INSTANCE_VCPU_SECOND": 0.000018,
    "CLOUD_RUN_INSTANCE_GIB_SECOND": 0.000002,
    "CLOUD_RUN_L4_SECOND": 0.0001867,
}
LOG_BYTES_PER_REQUEST = 600
GPU_VCPUS, GPU_GIB = 4, 16
_AMOUNTS = {"LARDER_PLAN_REQUESTS": 1_000_000.0, "LARDER_PLAN_MS": 40.0, "LARDER_PLAN_GPU_HOURS": 100.0}


@dataclass(frozen=True, slots=True)
class Cost:
    """One line of the estimate, in US dollars a month."""

    what: str
    dollars: float


def estimate(settings: DeploySettings, environ: Mapping[str, str] = os.environ) -> tuple[list[Cost], str]:
    """The lines of a month's bill and what they assume. Raises SettingsError for a price or amount that is no number."""
    price = {name: _number(f"LARDER_PRICE_{name}", default, environ) for name, default in PRICES.items()}
    amount = {name: _number(name, default, environ) for name, default in _AMOUNTS.items()}
    millions = amount["LARDER_PLAN_REQUESTS"] / 1e6
    seconds = amount["LARDER_PLAN_REQUESTS"] * amount["LARDER_PLAN_MS"] / 1000
    own_prices = sum(f"LARDER_PRICE_{name}" in environ for name in PRICES)
    assumed = f"{millions:g} million requests of {amount['LARDER_PLAN_MS']:g} ms a month"
    if settings.target == "aws":
        lines = _aws(settings, price, millions, seconds)
    else:
        lines = _cloud_run(settings, price, millions, seconds, amount["LARDER_PLAN_GPU_HOURS"])
        if settings.gpu == "yes":
            assumed += f", an instance awake for {amount['LARDER_PLAN_GPU_HOURS']:g} hours"
    return lines, f"{assumed}; list prices of {PRICES_AS_OF}" + (
        f", {own_prices} of them set by you" if own_prices else ""
    )


def _aws(settings: DeploySettings, price: Mapping[str, float], millions: float, seconds: float) -> list[Cost]:
    gigabytes = settings.memory_mb / 1024
    alarms = 3 + (2 if settings.events == "yes" else 0)
    lines = [
        Cost(
            "computing",
            seconds * (gigabytes * price["LAMBDA_GB_SECOND"] + 0.5 * price["LAMBDA_EXTRA_STORAGE_GB_SECOND"]),
        ),
        Cost("requests", millions * price["LAMBDA_MILLION_REQUESTS"]),
        Cost("logs", millions * 1e6 * LOG_BYTES_PER_REQUEST / 1e9 * price["LOG_GB"]),
        Cost(f"{alarms} alarms, 1 secret", alarms * price["ALARM_MONTH"] + price["SECRET_MONTH"]),
    ]
    if settings.door == "http-api":
        lines.append(Cost("HTTP API", millions * price["HTTP_API_MILLION_REQUESTS"]))
    if settings.events == "yes":
        # Each is sent, received and deleted, the last two in batches; one poller asks every 20 s when nothing comes.
        lines.append(Cost("queue", (millions * 1.02 + 5 * 0.13) * price["SQS_MILLION_REQUESTS"]))
    return lines


def _cloud_run(
    settings: DeploySettings, price: Mapping[str, float], millions: float, seconds: float, gpu_hours: float
) -> list[Cost]:
    if settings.gpu == "yes":
        awake = gpu_hours * 3600
        return [
            Cost("GPU (one L4)", awake * price["CLOUD_RUN_L4_SECOND"]),
            Cost(f"{GPU_VCPUS} processors", awake * GPU_VCPUS * price["CLOUD_RUN_INSTANCE_VCPU_SECOND"]),
            Cost(f"{GPU_GIB} GiB memory", awake * GPU_GIB * price["CLOUD_RUN_INSTANCE_GIB_SECOND"]),
        ]
    return [
        Cost("processor", seconds * price["CLOUD_RUN_VCPU_SECOND"]),
        Cost("memory", seconds * price["CLOUD_RUN_GIB_SECOND"]),
        Cost("requests", millions * price["CLOUD_RUN_MILLION_REQUESTS"]),
    ]


def _number(name: str, default: float, environ: Mapping[str, str]) -> float:
    given = environ.get(name)
    if not given:
        return default
    if not re.fullmatch(r"\d{1,12}(\.\d{1,12})?", given.strip(), re.ASCII):
        raise SettingsError(f"{name} is {given!r}; give a number such as {default:g}")
    return float(given)
