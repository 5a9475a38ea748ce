"""Cloud Run's Admin API (v1, the Knative one) as far as a deployment needs it, and the identity to call a service with.

https://cloud.google.com/run/docs/reference/rest: `replaceService` takes the whole service; `metadata.resourceVersion` makes
it refuse a service that somebody changed meanwhile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import requests

from schemas.errors import DeployError

ENDPOINT_VARIABLE = "CLOUDSDK_API_ENDPOINT_OVERRIDES_RUN"
"""gcloud's own name for another address of the API."""
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_TIMEOUT_SECONDS = 60


@dataclass(slots=True)
class CloudRunApi:
    """The services of one project in one region, called with the application default credentials."""

    project: str
    region: str
    _session: Any
    _credentials: Any

    @classmethod
    def open(cls, project: str, region: str) -> CloudRunApi:
        """Raises DeployError without credentials."""
        import google.auth
        from google.auth import exceptions
        from google.auth.transport.requests import AuthorizedSession

        try:
            credentials, _ = google.auth.default(scopes=[_SCOPE])
        except exceptions.DefaultCredentialsError as error:
            raise DeployError(
                "there are no Google credentials to deploy with; run `gcloud auth application-default login`, or name a "
                "service account's key file in GOOGLE_APPLICATION_CREDENTIALS"
            ) from error
        return cls(project, region, AuthorizedSession(credentials), credentials)

    def service(self, name: str) -> dict[str, Any] | None:
        """The service as it is, or None."""
        return self._call("GET", self._path("services", name))

    def revision(self, name: str) -> dict[str, Any] | None:
        """One revision, or None."""
        return self._call("GET", self._path("revisions", name))

    def create(self, service: Mapping[str, Any]) -> dict[str, Any]:
        """Create a service."""
        return self._call("POST", self._path("services"), service) or {}

    def replace(self, service: Mapping[str, Any]) -> dict[str, Any]:
        """Put the whole service in the place of what is there."""
        return self._call("PUT", self._path("services", service["metadata"]["name"]), service) or {}

    def secret_version(self, secret: str, variable: str) -> str:
        """The number of the newest enabled version of a secret in Secret Manager, which `variable` names.

        Its text is never read here.
        """
        base = os.environ.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER", "https://secretmanager.googleapis.com")
        url = f"{base.rstrip('/')}/v1/projects/{self.project}/secrets/{secret}/versions/latest"
        found = self._send("GET", url)
        if found is None:
            raise DeployError(
                f"there is no secret {secret!r} with a value in project {self.project}; create it, or name another in {variable}"
            )
        return str(found["name"]).rpartition("/")[2]

    def ask(
        self, url: str, payload: bytes, carrier: Mapping[str, str], key: str = "", timeout_seconds: float = 30
    ) -> bytes:
        """The body of the answer to a recommendation request at the service's `url`, asked as whom the credentials name.

        `key` is a request key of the service's own. Raises DeployError if nothing answers, or the platform does in the
        service's place.
        """
        headers = {"content-type": "application/json", **carrier}
        if key:
            headers["authorization"] = f"Bearer {key}"
        token = self._identity(url)
        if token:
            # The platform's own header, so that the other one is the service's.
            headers["x-serverless-authorization"] = f"Bearer {token}"
        try:
            answer = requests.post(f"{url}/recommendations", data=payload, headers=headers, timeout=timeout_seconds)
        except requests.RequestException as error:
            raise DeployError(f"{url} does not answer ({type(error).__name__})") from error
        if answer.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise DeployError(f"{url} answered {answer.status_code} without JSON; may {self._who()} call the service?")
        return bytes(answer.content)

    def _identity(self, audience: str) -> str | None:
        """An identity token for `audience`; None for credentials of a person, who cannot make one for a service."""
        from google.auth import exceptions
        from google.auth.transport.requests import Request
        from google.oauth2 import id_token

        try:
            return str(id_token.fetch_id_token(Request(), audience))
        except (exceptions.DefaultCredentialsError, exceptions.GoogleAuthError):
            return None

    def _who(self) -> str:
        return str(getattr(self._credentials, "service_account_email", "the account you logged in with"))

    def _path(self, kind: str, name: str = "") -> str:
        base = os.environ.get(ENDPOINT_VARIABLE) or f"https://{self.region}-run.googleapis.com"
        path = f"{base.rstrip('/')}/apis/serving.knative.dev/v1/namespaces/{self.project}/{kind}"
        return f"{path}/{name}" if name else path

    def _call(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        return self._send(method, url, body)

    def _send(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        from google.auth import exceptions

        try:
            answer = self._session.request(method, url, json=body, timeout=_TIMEOUT_SECONDS)
        except exceptions.RefreshError as error:
            raise DeployError(
                f"Google refuses the credentials ({error.args[0] if error.args else error}); log in again"
            ) from error
        except requests.RequestException as error:
            raise DeployError(f"Google Cloud cannot be reached: {type(error).__name__} at {url}") from error
        if answer.status_code == 404:
            return None
        if answer.status_code == 409:
            raise DeployError("somebody changed the service meanwhile; look at it, then deploy again")
        if answer.status_code >= 400:
            raise DeployError(f"Google Cloud refused {method} {url} ({answer.status_code}): {_message(answer.text)}")
        return dict(answer.json())


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
