"""The error tree: one type per remedy; every message names the thing, the value and the way out.

LarderError
├── SettingsError          a setting is missing or malformed: fix the environment
├── SourceError            the data folder cannot be read as a whole: fix DATA
├── LakeError              a day's file is missing or damaged: run `make mend-lake`
├── DatabaseError          Postgres cannot be used: fix DATABASE_URL or the server
├── EngineError            Spark cannot be started or reached: fix LARDER_SPARK_MASTER or the cluster
├── InstanceError          no Dagster instance runs, or it refuses: start it with `make ui`
├── DefinitionError        a declaration is wrong: fix schemas/views.py or a prompt file
├── ArtifactError          a model file is missing, changed or of another shape: release again
│   └── StoreUnavailable   the artefacts' bucket does not answer: check ARTIFACTS_URL and its credentials, or wait
├── GateError              a model did not pass: it is not released
├── DeployError            the cloud refused, or the function it got does not answer: see the message, `make deploy` again
├── ScoresError            people cannot be scored ahead as asked, or not now: see the message, `make score-all` again
├── UnknownPerson          nothing is held of that person: check the id
├── RequestError           the caller sent something unusable: fix the request (HTTP 4xx)
│   ├── Unauthorized       no key, or none that is good: send another (HTTP 401)
│   ├── Forbidden          the key is good and not for this: use one with the scope (HTTP 403)
│   └── TooManyRequests    the key's limit is used up: ask again later (HTTP 429)
└── Unavailable            nothing can answer right now: try again later (HTTP 503)
"""

from __future__ import annotations

from datetime import datetime


class LarderError(Exception):
    """Base of every error this product raises on purpose."""

    type = "error"


class SettingsError(LarderError):
    type = "settings"


class SourceError(LarderError):
    type = "source"


class LakeError(LarderError):
    type = "lake"


class DatabaseError(LarderError):
    type = "database"


class EngineError(LarderError):
    type = "engine"


class InstanceError(LarderError):
    type = "instance"


class DefinitionError(LarderError):
    type = "definition"


class ArtifactError(LarderError):
    type = "artifact"


class StoreUnavailable(ArtifactError):
    """Whether the artefact is there cannot be told now; later it can."""

    type = "artifact_store"


class GateError(LarderError):
    type = "gate"


class DeployError(LarderError):
    type = "deploy"


class ScoresError(LarderError):
    type = "scores"


class UnknownPerson(LarderError):
    """Nothing is held of a person. `forgotten_at` is set if they were forgotten before."""

    type = "unknown_person"

    def __init__(self, message: str, forgotten_at: datetime | None = None) -> None:
        super().__init__(message)
        self.forgotten_at = forgotten_at


class RequestError(LarderError):
    """A request that cannot be answered as it stands.

    `status` is the HTTP status, `field` the offending field (dotted path) where there is one.
    """

    type = "invalid_request"

    def __init__(self, message: str, *, status: int = 422, field: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.field = field


class Unauthorized(RequestError):
    type = "unauthorized"

    def __init__(self, message: str) -> None:
        super().__init__(message, status=401)


class Forbidden(RequestError):
    type = "forbidden"

    def __init__(self, message: str) -> None:
        super().__init__(message, status=403)


class TooManyRequests(RequestError):
    """`retry_after_seconds` is what the caller is told to wait."""

    type = "too_many_requests"

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message, status=429)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(LarderError):
    """No rung of the ladder can answer. `retry_after_seconds` is what the caller is told to wait."""

    type = "unavailable"

    def __init__(self, message: str, *, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
