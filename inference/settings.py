"""What a function is told by its environment, read once; every fault is reported at once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from inference.links import Links
from inference.pseudonyms import Pseudonyms
from inference.request_log import STREAMS, Stream
from schemas.consent import consent_default
from schemas.errors import LarderError, SettingsError
from schemas.urls import is_database_url, with_tls

ACCESS_MODES = ("keys", "keys-over-http", "platform")
"""Who checks a request: we, by its key; we, but for direct invocations, which IAM has checked; only who is in front."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Frozen settings of one process; times in milliseconds, counts plain."""

    database_url: str = field(repr=False)
    """What is read from, by a role that may read what requests need: `larder_function`."""
    artifacts_url: str
    timeout_ms: int = 2_000
    candidates: int = 500
    threads: int = 1
    """Threads per ONNX session; 0: as many as there are processors. The operations of one request are so short that a
    second thread takes longer to wake than it saves."""
    concurrency: int = 6
    """Requests answered at the same time by one process: enough for two processors to find work while others wait."""
    audit_per_mille: int = 10
    """Of how many people in a thousand the features served are logged for the skew audit."""
    scores_hours: int = 48
    """How old a list that `make score-all` made may be for a request to fall back on it; 0: none is read."""
    item_cache: int = 200_000
    """So many items at most are kept in memory, about a kilobyte each, see inference/item_cache.py; 0: requests look them up."""
    request_log: Stream = "stderr"
    """Where the line of each request goes, or `off`."""
    database_read_url: str | None = None
    """Where reads go; None: to `database_url`. A replica shows an event when it has reached it, not at once."""
    writer_url: str = field(default="", repr=False)
    """What events, served features and wishes to be forgotten are written by: `larder_writer`; empty: `database_url`."""
    access: str = "keys"
    """Who checks requests; one of ACCESS_MODES."""
    key_cache_seconds: int = 60
    """How long a key is trusted before it is looked up again: a revocation counts by then."""
    survey_per_mille: int = 0
    """Of how many people in a thousand the page asks its two questions in a week."""
    rules: str = ""
    """Where the deployment's rules are, a path or `s3://bucket/key`, see inference/rules.py; empty: there are none."""
    link_keys: str = field(default="", repr=False)
    """Secrets of signed links, see inference/links.py; empty: none are taken."""
    experiments: str = ""
    """The file that declares experiments, see inference/experiment.py; empty: there are none."""
    exploration: float = 0.0
    """Of how many requests the order is drawn at random, see inference/explore.py."""
    consent_default: bool = True
    """Whether who has said nothing of it agrees to being personalised; see schemas/consent.py."""
    log_keys: str = field(default="", repr=False)
    """Secrets that people are called by in the request log, see inference/pseudonyms.py; empty: lines say nothing of them."""
    llm_url: str = ""
    """A server that speaks the OpenAI chat protocol, up to `/chat/completions`; empty: wishes are taken as they are said."""
    llm_model: str = ""
    llm_key: str = field(default="", repr=False)
    llm_timeout_ms: int = 800
    """What one wish may take there; a request waits less where its own deadline is near."""


VARIABLES = {
    "database_url": "DATABASE_URL",
    "artifacts_url": "ARTIFACTS_URL",
    "request_log": "LARDER_REQUEST_LOG",
    "database_read_url": "DATABASE_READ_URL",
    "writer_url": "LARDER_WRITER_URL",
    "access": "LARDER_ACCESS",
    "rules": "LARDER_RULES",
    "link_keys": "LARDER_LINK_KEYS",
    "experiments": "LARDER_EXPERIMENTS",
    "exploration": "LARDER_EXPLORATION",
    "consent_default": "LARDER_CONSENT_DEFAULT",
    "log_keys": "LARDER_LOG_KEYS",
    "llm_url": "LARDER_LLM_URL",
    "llm_model": "LARDER_LLM_MODEL",
    "llm_key": "LARDER_LLM_KEY",
}
"""What each setting is read from; those of `LIMITS` besides."""
LIMITS: dict[str, tuple[str, int, int]] = {
    "timeout_ms": ("LARDER_TIMEOUT_MS", 10, 60_000),
    "candidates": ("LARDER_CANDIDATES", 10, 1_000),
    "threads": ("LARDER_THREADS", 0, 256),
    "concurrency": ("LARDER_CONCURRENCY", 1, 256),
    "audit_per_mille": ("LARDER_AUDIT_PER_MILLE", 0, 1_000),
    "scores_hours": ("LARDER_SCORES_HOURS", 0, 8_760),
    "item_cache": ("LARDER_ITEM_CACHE", 0, 10_000_000),
    "survey_per_mille": ("LARDER_SURVEY_PER_MILLE", 0, 1_000),
    "llm_timeout_ms": ("LARDER_LLM_TIMEOUT_MS", 10, 30_000),
    "key_cache_seconds": ("LARDER_KEY_CACHE_SECONDS", 1, 3_600),
}


def read_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from `environ`. Raises SettingsError that lists every fault and its way out."""
    faults: list[str] = []
    values: dict[str, int] = {}
    for setting, (name, low, high) in LIMITS.items():
        text = environ.get(name)
        if not text:  # what a template passes on without a value is not set
            continue
        if not re.fullmatch(r"\s*\d{1,9}\s*", text, re.ASCII) or not low <= int(text) <= high:
            faults.append(f"{name} is {text!r}; give a whole number from {low} to {high}")
        else:
            values[setting] = int(text)
    for name in ("DATABASE_URL", "ARTIFACTS_URL"):
        if not environ.get(name):
            faults.append(f"{name} is not set; `make serve` sets it for the current deployment")
    if environ.get("ARTIFACTS_URL") and not environ["ARTIFACTS_URL"].startswith(("file://", "s3://")):
        faults.append(f"ARTIFACTS_URL is {environ['ARTIFACTS_URL']!r}; give file:///folder or s3://bucket/prefix")
    said = environ.get("LARDER_REQUEST_LOG", "stderr").strip().lower()
    stream = next((known for known in STREAMS if known == said), None)
    if stream is None:
        faults.append(f"LARDER_REQUEST_LOG is {said!r}; give {', '.join(STREAMS[:-1])} or {STREAMS[-1]}")
    for name in ("DATABASE_URL", "DATABASE_READ_URL", "LARDER_WRITER_URL"):
        # What stands there is not quoted: it may hold a password.
        if environ.get(name) and not is_database_url(environ[name]):
            faults.append(f"{name} is no postgresql:// URL; give one such as postgresql://user@host:5432/name")
    access = environ.get("LARDER_ACCESS", "keys")
    if access not in ACCESS_MODES:
        faults.append(f"LARDER_ACCESS is {access!r}; give one of {', '.join(ACCESS_MODES)}")
    link_keys = environ.get("LARDER_LINK_KEYS", "")
    log_keys = environ.get("LARDER_LOG_KEYS", "")
    for read, text in ((Links.read, link_keys), (Pseudonyms.read, log_keys)):
        try:
            if text:
                read(text)
        except LarderError as error:
            faults.append(str(error))
    agrees = True
    try:
        agrees = consent_default(environ)
    except LarderError as error:
        faults.append(str(error))
    exploration = (environ.get("LARDER_EXPLORATION") or "0").strip()
    if not re.fullmatch(r"0|1|[01]?\.\d{1,9}", exploration, re.ASCII) or float(exploration) > 1:
        faults.append(f"LARDER_EXPLORATION is {exploration!r}; give a share from 0 to 1, such as 0.02")
    if environ.get("LARDER_LLM_URL"):
        from inference.chat import open_chat  # HTTP's client is loaded only where it is used

        try:
            open_chat(environ)
        except LarderError as error:
            faults.append(str(error))
    if faults:
        raise SettingsError("settings cannot be used: " + "; ".join(faults))
    return Settings(
        with_tls(environ["DATABASE_URL"], environ),
        environ["ARTIFACTS_URL"],
        writer_url=with_tls(environ.get("LARDER_WRITER_URL", ""), environ),
        access=access,
        link_keys=link_keys,
        log_keys=log_keys,
        rules=environ.get("LARDER_RULES", ""),
        database_read_url=with_tls(environ.get("DATABASE_READ_URL", ""), environ) or None,
        request_log=stream or "stderr",
        experiments=environ.get("LARDER_EXPERIMENTS", ""),
        exploration=float(exploration),
        consent_default=agrees,
        llm_url=environ.get("LARDER_LLM_URL", ""),
        llm_model=environ.get("LARDER_LLM_MODEL", ""),
        llm_key=environ.get("LARDER_LLM_KEY", ""),
        **values,
    )
