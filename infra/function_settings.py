"""What a function in a cloud is told of inference/settings.py: by its own name, by a secret's, or by where a file lies.

A setting means the same there as here, so it is read from the variable that this machine's own commands read it from.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from inference.rules import parse_rules, read_text
from inference.settings import read_settings
from infra.deployment import Deployment
from schemas.errors import SettingsError

SECRETS = {
    "DATABASE_URL": "LARDER_DATABASE_SECRET",
    "LARDER_WRITER_URL": "LARDER_WRITER_SECRET",
    "DATABASE_READ_URL": "LARDER_DATABASE_READ_SECRET",
    "LARDER_LINK_KEYS": "LARDER_LINK_KEYS_SECRET",
    "LARDER_LOG_KEYS": "LARDER_LOG_KEYS_SECRET",
    "LARDER_LLM_KEY": "LARDER_LLM_KEY_SECRET",
}
"""Which variable names the secret whose text becomes the function's own; only the cloud reads it."""
PLAIN = (
    "LARDER_TIMEOUT_MS",
    "LARDER_CANDIDATES",
    "LARDER_AUDIT_PER_MILLE",
    "LARDER_SCORES_HOURS",
    "LARDER_ITEM_CACHE",
    "LARDER_SURVEY_PER_MILLE",
    "LARDER_KEY_CACHE_SECONDS",
    "LARDER_EXPLORATION",
    "LARDER_LLM_URL",
    "LARDER_LLM_MODEL",
    "LARDER_LLM_TIMEOUT_MS",
)
"""Passed as they are."""
OF_THE_DEPLOYMENT = ("ARTIFACTS_URL", "LARDER_ACCESS", "LARDER_CONSENT_DEFAULT", "LARDER_RULES", "LARDER_EXPERIMENTS")
"""What a deployment says by settings of its own (`deploy_settings.py`), or by where it puts a file."""
NOT_FOR_THE_CLOUD = {
    "LARDER_THREADS": "a graph that runs on more than one thread waits for it longer than it saves; see `Settings.threads`",
    "LARDER_CONCURRENCY": "Lambda sends one request at a time; the service files of Cloud Run say 8 beside their containerConcurrency",
    "LARDER_REQUEST_LOG": "both platforms collect what goes to stderr",
}
"""What is not passed, and why."""

DECLARED = "declared"
"""Folder below the artefacts with what is declared for functions: rules by their hash, experiments."""


def read_plain(environ: Mapping[str, str], faults: list[str]) -> dict[str, str]:
    """What of `PLAIN` is set. Adds to `faults` what the function itself would refuse, in its own words."""
    plain = {name: environ[name].strip() for name in PLAIN if environ.get(name, "").strip()}
    stand_in = {"DATABASE_URL": "postgresql://", "ARTIFACTS_URL": "file:///"}
    try:
        settings = read_settings({**stand_in, **plain})
    except SettingsError as error:
        faults.append(str(error).removeprefix("settings cannot be used: "))
    else:
        host = urlsplit(settings.llm_url).hostname or ""
        if host and _is_loopback(host):
            faults.append(
                f"LARDER_LLM_URL names {host}, which in a cloud is the function itself; give an address that it reaches"
            )
    return plain


def read_rules(record: Deployment, faults: list[str]) -> tuple[str, bytes]:
    """Name below the artefacts, by its hash, and content of the deployment's rules; two empty ones where there are none.

    Another content is another name: a version of the function keeps the rules that it was deployed with.
    """
    if not record.rules:
        return "", b""
    try:
        text = read_text(record.rules)
        parse_rules(text, record.rules)
    except SettingsError as error:
        faults.append(str(error))
        return "", b""
    content = text.encode()
    return f"{DECLARED}/rules-{hashlib.sha256(content).hexdigest()[:16]}.toml", content


def read_experiments(environ: Mapping[str, str], root_url: str, faults: list[str]) -> str:
    """Where experiments are declared, below `root_url`; empty where LARDER_EXPERIMENTS is not set.

    Not a copy: a record of what is over is written beside the declarations, and functions must find it there at once.
    """
    place = environ.get("LARDER_EXPERIMENTS", "").strip()
    if not place:
        return ""
    root = root_url.rstrip("/") + "/"
    if not place.startswith("s3://"):
        place, root = str(Path(place).resolve()), unquote(urlsplit(root).path) if root.startswith("file://") else root
    name = place.removeprefix(root) if place.startswith(root) else ""
    if name.startswith(f"{DECLARED}/") and name.endswith(".toml") and ".." not in name.split("/"):
        return name
    faults.append(
        f"a function cannot read LARDER_EXPERIMENTS, {place}; put the file at {root}{DECLARED}/experiments.toml and name it "
        "so, here and for Dagster, which writes beside it what is over"
    )
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
