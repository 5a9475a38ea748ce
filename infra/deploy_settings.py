"""What a deployment to a cloud is told by its environment, read once; every fault is reported at once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from infra.deployment import Deployment
from infra.function_settings import SECRETS, read_experiments, read_plain, read_rules
from schemas.consent import SETTING as CONSENT_DEFAULT
from schemas.errors import SettingsError

Target = Literal["aws", "cloud-run"]
TARGETS: tuple[Target, ...] = ("aws", "cloud-run")
TARGET_VARIABLE = "LARDER_DEPLOY_TARGET"
_KEEPERS = {"aws": "AWS Secrets Manager", "cloud-run": "Secret Manager"}

_NUMBERS: dict[str, tuple[str, float, float]] = {
    "memory_mb": ("LARDER_FUNCTION_MEMORY_MB", 512, 10_240),
    "timeout_seconds": ("LARDER_FUNCTION_TIMEOUT_SECONDS", 3, 60),
    "max_instances": ("LARDER_FUNCTION_MAX_INSTANCES", 1, 1_000),
    "canary_rate": ("LARDER_CANARY_RATE", 0, 0.5),
    "canary_seconds": ("LARDER_CANARY_SECONDS", 0, 3_600),
    "smoke_seconds": ("LARDER_SMOKE_SECONDS", 1, 600),
}
_CHOICES: dict[str, tuple[str, tuple[str, ...]]] = {
    "door": ("LARDER_DOOR", ("function-url", "http-api", "none")),
    "url_auth": ("LARDER_URL_AUTH", ("AWS_IAM", "NONE")),
    "access": ("LARDER_FUNCTION_ACCESS", ("keys", "keys-over-http", "platform")),
    "consent_default": (CONSENT_DEFAULT, ("yes", "no")),
    "events": ("LARDER_EVENTS_QUEUE", ("yes", "no")),
    "gpu": ("LARDER_FUNCTION_GPU", ("yes", "no")),
}
_TEXTS = {
    "image": "LARDER_IMAGE",
    "smoke_key": "LARDER_SMOKE_KEY",
    "otlp_endpoint": "LARDER_FUNCTION_OTLP_ENDPOINT",
    "subnets": "LARDER_FUNCTION_SUBNETS",
    "security_groups": "LARDER_FUNCTION_SECURITY_GROUPS",
    "alarm_topic": "LARDER_ALARM_TOPIC",
    "project": "LARDER_GOOGLE_PROJECT",
    "region": "LARDER_GOOGLE_REGION",
    "service_account": "LARDER_GOOGLE_SERVICE_ACCOUNT",
    "bucket": "LARDER_GOOGLE_BUCKET",
}


@dataclass(frozen=True, slots=True)
class DeploySettings:
    """Where the function goes and how; texts are empty where nothing was said."""

    target: Target
    name: str
    artifacts_url: str
    """`s3://bucket/prefix` that the function reads (AWS); empty for Cloud Run, which mounts `bucket`."""
    image: str = ""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Names of secrets by the function's variable that each becomes; see `function_settings.SECRETS`."""
    plain: Mapping[str, str] = field(default_factory=dict)
    """What the function is told as it is, by variable."""
    declared_url: str = ""
    """Where this machine finds what the function reads below its ARTIFACTS_URL."""
    rules: str = ""
    """Name of the rules below there, `declared/rules-<hash>.toml`; empty: there are none."""
    rules_content: bytes = b""
    experiments: str = ""
    """Name of the experiments' declarations below there; empty: there are none."""
    smoke_key: str = field(default="", repr=False)
    """The request key that the smoke test sends where the function asks for one."""
    otlp_endpoint: str = ""
    subnets: str = ""
    security_groups: str = ""
    alarm_topic: str = ""
    project: str = ""
    region: str = ""
    service_account: str = ""
    bucket: str = ""
    door: str = "function-url"
    url_auth: str = "AWS_IAM"
    access: str = "keys-over-http"
    """What the function gets as LARDER_ACCESS: who checks its requests."""
    consent_default: str = "yes"
    """What the function gets as LARDER_CONSENT_DEFAULT: Dagster's own, so that both go by the same."""
    events: str = "no"
    gpu: str = "no"
    memory_mb: float = 1_769
    timeout_seconds: float = 10
    max_instances: float = 20
    canary_rate: float = 0.1
    """Share of requests that a new version answers before it answers all of them; 0 leaves that step out."""
    canary_seconds: float = 60
    smoke_seconds: float = 60
    """How long a new version may take until it answers as it should."""


def read_target(environ: Mapping[str, str] = os.environ) -> Target | None:
    """The target that the environment names, or None. Raises SettingsError for one that is unknown."""
    return check_target(environ[TARGET_VARIABLE]) if environ.get(TARGET_VARIABLE) else None


def check_target(name: str) -> Target:
    """`name` as a target. Raises SettingsError if it is none."""
    for target in TARGETS:
        if name == target:
            return target
    raise SettingsError(f"there is no target {name!r}; known: {', '.join(TARGETS)}")


def read_deploy_settings(record: Deployment, target: Target, environ: Mapping[str, str] = os.environ) -> DeploySettings:
    """Settings for `target` from `environ`. Raises SettingsError that lists every fault and its way out."""
    faults: list[str] = []
    texts: dict[str, Any] = {setting: environ[name].strip() for setting, name in _TEXTS.items() if environ.get(name)}
    for setting, (name, choices) in _CHOICES.items():
        if environ.get(name):
            if environ[name] in choices:
                texts[setting] = environ[name]
            else:
                faults.append(f"{name} is {environ[name]!r}; give one of {', '.join(choices)}")
    numbers: dict[str, Any] = {}
    for setting, (name, low, high) in _NUMBERS.items():
        if environ.get(name):
            given = environ[name].strip()
            if re.fullmatch(r"\d{1,6}(\.\d{1,4})?", given, re.ASCII) and low <= float(given) <= high:
                numbers[setting] = float(given)
            else:
                faults.append(f"{name} is {given!r}; give a number from {low:g} to {high:g}")
    name = environ.get("LARDER_FUNCTION_NAME") or re.sub(r"[^a-z0-9]+", "-", f"larder-{record.name}".lower()).strip("-")
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,39}", name):
        faults.append(
            f"the function's name would be {name!r}; set LARDER_FUNCTION_NAME to small letters, digits and -, 40 at most"
        )
    url = (environ.get("LARDER_DEPLOY_URL") or record.artifacts_url).rstrip("/")
    secrets = {told: environ[named].strip() for told, named in SECRETS.items() if environ.get(named, "").strip()}
    plain = read_plain(environ, faults)
    declared_url = url if target == "aws" else record.artifacts_url.rstrip("/")
    rules, content = read_rules(record, faults)
    experiments = read_experiments(environ, declared_url, faults)
    faults += _missing_for_aws(texts, url) if target == "aws" else _missing_for_cloud_run(texts)
    if "DATABASE_URL" not in secrets:
        faults.append(
            f"{SECRETS['DATABASE_URL']} is not set; name the secret in {_KEEPERS[target]} whose text is the postgresql:// URL "
            "that the function connects with"
        )
    if faults:
        raise SettingsError("settings cannot be used: " + "; ".join(faults))
    return DeploySettings(
        target,
        name,
        url if target == "aws" else "",
        secrets=secrets,
        plain=plain,
        declared_url=declared_url,
        rules=rules,
        rules_content=content,
        experiments=experiments,
        **texts,
        **numbers,
    )


def _missing_for_aws(texts: Mapping[str, str], url: str) -> list[str]:
    faults = []
    if not re.fullmatch(r"s3://[a-z0-9.-]{3,63}/[A-Za-z0-9._/-]+", url):
        faults.append(
            f"a function cannot read {url!r}: set LARDER_DEPLOY_URL to s3://bucket/prefix, where the model is copied to"
        )
    if texts.get("image") and "@sha256:" not in texts["image"]:
        faults.append(
            f"LARDER_IMAGE is {texts['image']!r}; name it by digest, registry/name@sha256:…, so that it cannot change"
        )
    if texts.get("subnets") and not texts.get("security_groups"):
        faults.append("LARDER_FUNCTION_SUBNETS is set and LARDER_FUNCTION_SECURITY_GROUPS is not; give both or neither")
    if texts.get("gpu") == "yes":
        faults.append("LARDER_FUNCTION_GPU is yes, and AWS Lambda has no GPUs; use TARGET=cloud-run")
    return faults


def _missing_for_cloud_run(texts: Mapping[str, str]) -> list[str]:
    wanted = {
        "project": "the project that the service runs in",
        "region": "its region, such as europe-west1",
        "image": "the function's image by digest, registry/name@sha256:…",
        "service_account": "the service account that the service runs as",
        "bucket": "the Cloud Storage bucket that holds what lies below ARTIFACTS_URL",
    }
    faults = [
        f"{_TEXTS[setting]} is not set: {meaning}" for setting, meaning in wanted.items() if not texts.get(setting)
    ]
    if texts.get("image") and "@sha256:" not in texts["image"]:
        faults.append(
            f"LARDER_IMAGE is {texts['image']!r}; name it by digest, registry/name@sha256:…, so that it cannot change"
        )
    return faults
