"""A stand-in for Google Cloud: token end point, Secret Manager's newest version, Cloud Run's services, and their traffic.

Services are held against Google's own description of the API. A revision's requests are answered by the core of the tests
(`smoke_app`) through our own routing, for callers with an identity token.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import google_schema
from smoke_app import SmokeApplication

from inference.http import handle

NAMESPACE = "/apis/serving.knative.dev/v1/namespaces/shop-project"


@dataclass
class CloudRunDouble:
    """`behaviour` says by model how its revisions answer; `broken_images` cannot be started."""

    url: str = ""
    behaviour: dict[str, dict[str, Any]] = field(default_factory=dict)
    broken_images: set[str] = field(default_factory=set)
    services: dict[str, dict[str, Any]] = field(default_factory=dict)
    revisions: dict[str, dict[str, Any]] = field(default_factory=dict)
    applications: dict[str, SmokeApplication] = field(default_factory=dict)
    secret_version: int = 1
    calls: list[str] = field(default_factory=list)
    carriers: list[str] = field(default_factory=list)
    splits: list[dict[str, int]] = field(default_factory=list)

    def answering(self, name: str) -> dict[str, int]:
        traffic = self.services[name]["spec"]["traffic"]
        return {one["revisionName"]: one["percent"] for one in traffic if one.get("percent")}

    def writes(self) -> list[str]:
        """The calls so far that change something, forgotten once told."""
        told = [call for call in self.calls if call.startswith(("PUT", "POST /apis"))]
        self.calls.clear()
        return told

    def put(self, service: dict[str, Any], generation: int) -> dict[str, Any]:
        """Store a service as Cloud Run would, and reconcile it at once."""
        name = service["metadata"]["name"]
        template = service["spec"]["template"]
        revision = template["metadata"]["name"]
        if revision in self.revisions and self.revisions[revision]["spec"] != template["spec"]:
            raise ValueError(f"Revision named '{revision}' with different configuration already exists.")
        image = template["spec"]["containers"][0]["image"]
        ready = {
            "type": "Ready",
            "status": "False" if image in self.broken_images else "True",
            "message": "the container died",
        }
        if revision not in self.revisions:
            model = template["metadata"]["annotations"]["larder/model"]
            self.revisions[revision] = {
                "metadata": {"name": revision},
                "spec": template["spec"],
                "status": {"conditions": [ready]},
            }
            self.applications[revision] = SmokeApplication(model, **self.behaviour.get(model, {}))
        service["metadata"] |= {
            "generation": generation,
            "resourceVersion": f"v{generation}",
            "namespace": "shop-project",
        }
        service["spec"].setdefault("traffic", [{"revisionName": revision, "percent": 100}])
        traffic = [
            {**one, "url": f"{self.url}/tag/{name}/{one['tag']}"} if "tag" in one else one
            for one in service["spec"]["traffic"]
        ]
        service["status"] = {
            "observedGeneration": generation,
            "conditions": [ready],
            "url": f"{self.url}/main/{name}",
            "traffic": traffic,
            "latestReadyRevisionName": revision,
        }
        self.services[name] = service
        self.splits.append(self.answering(name))
        return service


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    double: CloudRunDouble


class _Requests(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        double = self.server.double
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        double.calls.append(f"{self.command} {self.path}")
        if self.path == "/token":
            claims = json.loads(base64.urlsafe_b64decode(body.decode().partition("assertion=")[2].split(".")[1] + "=="))
            kind = "id_token" if "target_audience" in claims else "access_token"
            token = _unsigned(claims["target_audience"]) if kind == "id_token" else "access"
            self._reply(200, {kind: token, "expires_in": 3600, "token_type": "Bearer"})
        elif self.path.startswith(("/main/", "/tag/")):
            self._serve(body)
        elif self.headers.get("Authorization") != "Bearer access":
            self._reply(401, {"error": {"message": "who are you?"}})
        elif found := re.fullmatch(r"/v1/projects/shop-project/secrets/(shop-[a-z-]+)/versions/latest", self.path):
            self._reply(200, {"name": f"projects/1/secrets/{found[1]}/versions/{double.secret_version}"})
        elif self.path.startswith(f"{NAMESPACE}/"):
            self._admin(self.path.removeprefix(f"{NAMESPACE}/"), body)
        else:
            self._reply(404, {"error": {"message": "not found"}})

    do_GET = do_POST = do_PUT = _handle

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _admin(self, what: str, body: bytes) -> None:
        double = self.server.double
        kind, _, name = what.partition("/")
        if self.command == "GET":
            found = (double.services if kind == "services" else double.revisions).get(name)
            self._reply(200 if found else 404, deepcopy(found) if found else {"error": {"message": f"no {name}"}})
            return
        service = json.loads(body)
        wrong = google_schema.faults(service)
        if wrong:
            self._reply(400, {"error": {"message": "; ".join(wrong)}})
            return
        there = double.services.get(service["metadata"]["name"])
        given = service["metadata"].get("resourceVersion")
        if there and given != there["metadata"]["resourceVersion"]:
            self._reply(409, {"error": {"message": "conflict"}})
            return
        try:
            self._reply(200, double.put(service, (there["metadata"]["generation"] if there else 0) + 1))
        except ValueError as error:
            self._reply(400, {"error": {"message": str(error)}})

    def _serve(self, body: bytes) -> None:
        double = self.server.double
        found = re.fullmatch(r"/(main|tag)/([^/]+)(?:/([^/]+))?(/recommendations)", self.path)
        assert found is not None
        service = double.services[found[2]]
        if not self.headers.get("X-Serverless-Authorization", "").startswith("Bearer ey"):
            self._reply(403, b"<html>forbidden</html>", "text/html")
            return
        traffic = service["spec"]["traffic"]
        chosen = next(
            one for one in traffic if (one.get("tag") == found[3] if found[1] == "tag" else one.get("percent"))
        )
        double.carriers.append(self.headers.get("traceparent", ""))
        headers = {name.lower(): value for name, value in self.headers.items()}
        application = double.applications[chosen["revisionName"]]
        answer = handle(application, "POST", "/recommendations", headers, body, deadline=None)
        self._reply(answer.status, answer.body, answer.headers["content-type"])

    def _reply(self, status: int, body: Any, kind: str = "application/json") -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _unsigned(audience: str) -> str:
    parts = ({"alg": "none"}, {"aud": audience, "exp": 4_000_000_000})
    return ".".join(
        [*(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts), "c2ln"]
    )


def key_file(folder: Path, url: str) -> Path:
    """A service account's key file, made for the test, whose tokens come from the double."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    pem = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = folder / "key.json"
    about = {
        "type": "service_account",
        "project_id": "shop-project",
        "client_email": "deploy@shop-project.iam.gserviceaccount.com",
        "token_uri": f"{url}/token",
        "private_key": pem.decode(),
    }
    file.write_text(json.dumps(about))
    return file


@contextmanager
def running_cloud_run() -> Iterator[CloudRunDouble]:
    """The double, until the block ends."""
    server = _Server(("127.0.0.1", 0), _Requests)
    server.double = CloudRunDouble(url=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.double
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
