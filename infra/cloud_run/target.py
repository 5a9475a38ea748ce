"""Cloud Run as a target: a new revision without traffic, its smoke test under a tag, then the traffic; the way back."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

from inference import artifacts
from infra import smoke
from infra.cloud_run.api import CloudRunApi
from infra.deploy_settings import DeploySettings
from infra.function_settings import SECRETS
from infra.release import Progress, Release
from schemas.errors import ArtifactError, DeployError

TAG = "candidate"
"""The new revision's own address while it has no traffic."""
BEFORE = "larder/before"
"""Annotation of the service: the revision that answered before this one."""
MODEL = "larder/model"
FILES = {"no": Path(__file__).with_name("service.yaml"), "yes": Path(__file__).with_name("service-gpu.yaml")}
MOUNTED = "/artifacts"
"""Where the service files mount the bucket."""
POLL_SECONDS = 2.0
PATIENCE_SECONDS = 900.0


@dataclass(slots=True)
class CloudRun:
    """One deployment's service in one project and region."""

    settings: DeploySettings
    api: CloudRunApi

    @classmethod
    def open(cls, settings: DeploySettings) -> CloudRun:
        """Raises DeployError without credentials."""
        return cls(settings, CloudRunApi.open(settings.project, settings.region))

    @property
    def place(self) -> str:
        return f"Google Cloud project {self.settings.project}, region {self.settings.region}"

    def plan(self, released: Release) -> list[str]:
        """What `deploy` would change, one line each; empty if nothing. Changes nothing itself."""
        there = self.api.service(self.settings.name)
        wanted = self._service(released)
        revision = wanted["spec"]["template"]["metadata"]["name"]
        given = self.settings
        lines = []
        if given.rules and not self._rules_are_there():
            lines.append(f"store {given.declared_url}/{given.rules}")
        if there is None:
            return [*lines, f"create the service {given.name}", f"create its revision {revision}"]
        lines += [] if self.api.revision(revision) is not None else [f"create the revision {revision}"]
        if _answering(there) != {revision: 100}:
            share = f", {self.settings.canary_rate:.0%} of it first" if self.settings.canary_rate else ""
            lines.append(f"move the traffic from {_told(_answering(there))} to {revision}, after a smoke test{share}")
        return lines

    def deploy(self, released: Release, carrier: Mapping[str, str], progress: Progress) -> bool:
        """Bring the service to `released` and these settings; False if nothing had to change.

        A revision is named after all that it is made of, so a repeat finds it and goes on. Raises DeployError.
        """
        given = self.settings
        if given.rules and not self._rules_are_there():
            artifacts.put(given.declared_url, given.rules, given.rules_content)
            progress(f"  the rules stored at {given.declared_url}/{given.rules}")
        wanted = self._service(released)
        revision = wanted["spec"]["template"]["metadata"]["name"]
        there = self.api.service(self.settings.name)
        if there is None:
            self._create(wanted, revision, released, carrier, progress)
            return True
        if _answering(there) == {revision: 100}:
            answer = self._test(there["status"]["url"], released, carrier, f"the service {self.settings.name}")
            progress(f"  {revision} answers: {answer.items} items, first answer {answer.first_ms:.0f} ms")
            return False
        if self.api.revision(revision) is not None:
            # It was made by a run before; a template that names it again might be refused.
            wanted["spec"]["template"] = there["spec"]["template"]
        before = there["spec"].get("traffic", [])
        answered = max(_answering(there).items(), key=lambda one: one[1])[0]
        original = deepcopy(there)
        try:
            self._send_traffic(wanted, there, [{"revisionName": answered, "percent": 100}, _tagged(revision)], answered)
            there = self._ready(revision, progress)
            answer = self._test(_tag_url(there), released, carrier, f"the revision {revision}")
            progress(f"  {revision} answers: {answer.items} items, first answer {answer.first_ms:.0f} ms")
            share = round(self.settings.canary_rate * 100)
            if share:
                split = [{"revisionName": answered, "percent": 100 - share}, _tagged(revision, share)]
                self._send_traffic(wanted, there, split, answered)
                there = self._ready(revision, progress)
                progress(f"  {revision} answers {share} % of the requests for {self.settings.canary_seconds:g} s")
                self._watch(_tag_url(there), released, carrier, revision)
            self._send_traffic(wanted, there, [{"revisionName": revision, "percent": 100}], answered)
            there = self._ready(revision, progress)
            self._test(there["status"]["url"], released, carrier, f"the service {self.settings.name}")
        except DeployError as error:
            now = self.api.service(self.settings.name) or there
            self._send_traffic(original, now, before or [{"revisionName": answered, "percent": 100}], None)
            raise DeployError(f"{error}; the traffic is back at {answered}") from error
        progress(f"  {revision} answers every request; before it {answered}")
        return True

    def roll_back(self, progress: Progress) -> str:
        """Let the revision before answer again. Raises DeployError if there is none."""
        there = self.api.service(self.settings.name)
        if there is None:
            raise DeployError(
                f"there is no service {self.settings.name} to roll back; `make deploy TARGET=cloud-run` first"
            )
        answering = _answering(there)
        before = there["metadata"].get("annotations", {}).get(BEFORE)
        if len(answering) > 1:
            # A release that was interrupted on its way: what answers most is what was before.
            before = max(answering.items(), key=lambda one: one[1])[0]
        if not before:
            raise DeployError(
                f"{_told(answering)} is the first revision of {self.settings.name}; nothing was before it"
            )
        now = next((name for name in answering if name != before), before)
        self._send_traffic(there, there, [{"revisionName": before, "percent": 100}], now)
        self._ready(None, progress)
        progress(f"{before} answers again; `make rollback WHAT=function` once more returns to {now}")
        return str(before)

    def _rules_are_there(self) -> bool:
        try:
            artifacts.get(self.settings.declared_url, self.settings.rules)
        except ArtifactError:
            return False
        return True

    def urls(self) -> dict[str, str]:
        """Where the service is reached."""
        there = self.api.service(self.settings.name)
        return {"Url": there["status"]["url"]} if there else {}

    def _service(self, released: Release) -> dict[str, Any]:
        """The service file of these settings, its revision named after its content."""
        given = self.settings
        text = Template(FILES[given.gpu].read_text(encoding="utf-8")).substitute(
            NAME=given.name,
            MAX_INSTANCES=f"{given.max_instances:.0f}",
            TIMEOUT_SECONDS=f"{given.timeout_seconds:.0f}",
            SERVICE_ACCOUNT=given.service_account,
            IMAGE=given.image,
            DATABASE_SECRET=given.secrets["DATABASE_URL"],
            DATABASE_SECRET_VERSION=self.api.secret_version(given.secrets["DATABASE_URL"], SECRETS["DATABASE_URL"]),
            ACCESS=given.access,
            CONSENT_DEFAULT=given.consent_default,
            OTLP_ENDPOINT=given.otlp_endpoint,
            BUCKET=given.bucket,
            LIKE_THIS="${LIKE_THIS}",
        )
        service: dict[str, Any] = yaml.safe_load(text)
        template = service["spec"]["template"]
        template["metadata"]["annotations"][MODEL] = released.version
        container = template["spec"]["containers"][0]
        for name, secret in given.secrets.items():
            if name == "DATABASE_URL":
                continue  # in the file, which is also filled in by hand
            reference = {"name": secret, "key": self.api.secret_version(secret, SECRETS[name])}
            container["env"].append({"name": name, "valueFrom": {"secretKeyRef": reference}})
        places = {"LARDER_RULES": given.rules, "LARDER_EXPERIMENTS": given.experiments}
        plain = dict(given.plain) | {name: f"{MOUNTED}/{place}" for name, place in places.items() if place}
        container["env"] += [{"name": name, "value": value} for name, value in plain.items()]
        # What nothing was said of is not set at all.
        container["env"] = [one for one in container["env"] if one.get("value") != ""]
        digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:8]
        template["metadata"]["name"] = self._name(f"{given.name}-{digest}")
        return service

    def _name(self, base: str) -> str:
        """`base`, or with a number behind it where a revision of that name could not be started."""
        name, number = base, 1
        while _condition(self.api.revision(name)).get("status") == "False":
            number += 1
            name = f"{base}-{number}"
        return name

    def _create(
        self,
        wanted: dict[str, Any],
        revision: str,
        released: Release,
        carrier: Mapping[str, str],
        progress: Progress,
    ) -> None:
        self.api.create(wanted)
        there = self._ready(revision, progress)
        answer = self._test(there["status"]["url"], released, carrier, f"the revision {revision}")
        progress(f"  {revision} answers: {answer.items} items, first answer {answer.first_ms:.0f} ms")

    def _send_traffic(
        self, wanted: dict[str, Any], there: dict[str, Any], traffic: list[dict[str, Any]], before: str | None
    ) -> None:
        """Replace the service by `wanted` with `traffic`, unless somebody changed it since `there` was read."""
        service = {"apiVersion": there["apiVersion"], "kind": there["kind"], "spec": deepcopy(wanted["spec"])}
        service["spec"]["traffic"] = traffic
        about = there["metadata"]
        annotations = {**about.get("annotations", {}), **wanted["metadata"].get("annotations", {})}
        if before is not None:
            annotations[BEFORE] = before
        service["metadata"] = {
            "name": about["name"],
            "namespace": about.get("namespace", self.settings.project),
            "resourceVersion": about["resourceVersion"],
            "labels": about.get("labels", {}),
            "annotations": annotations,
        }
        answer = self.api.replace(service)
        there["metadata"] = answer["metadata"]

    def _ready(self, revision: str | None, progress: Progress) -> dict[str, Any]:
        """The service once it has done what it was told. Raises DeployError with its reason if it cannot."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            there = self.api.service(self.settings.name)
            if there is not None:
                status = there.get("status", {})
                ready = _condition(there)
                seen = status.get("observedGeneration") == there["metadata"].get("generation")
                if seen and ready.get("status") == "True":
                    return there
                if seen and ready.get("status") == "False":
                    what = revision or self.settings.name
                    raise DeployError(f"{what} cannot be started: {ready.get('message', 'no reason given')}")
            if time.monotonic() > until:
                raise DeployError(
                    f"{self.settings.name} is not ready after {PATIENCE_SECONDS / 60:.0f} minutes; look at its logs"
                )
            time.sleep(POLL_SECONDS)

    def _test(self, url: str, released: Release, carrier: Mapping[str, str], what: str) -> smoke.Answer:
        return smoke.test(
            lambda payload: self.api.ask(url, payload, carrier, self.settings.smoke_key),
            released.version,
            self.settings.smoke_seconds,
            what,
        )

    def _watch(self, url: str, released: Release, carrier: Mapping[str, str], revision: str) -> None:
        until = time.monotonic() + self.settings.canary_seconds
        while True:
            self._test(url, released, carrier, f"the revision {revision}")
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(10.0, left))


def _condition(thing: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The condition Ready of a service or revision; empty while it has none."""
    conditions = thing["status"].get("conditions", ()) if thing and "status" in thing else ()
    return next((one for one in conditions if one["type"] == "Ready"), {})


def _tagged(revision: str, percent: int = 0) -> dict[str, Any]:
    return {"revisionName": revision, "percent": percent, "tag": TAG}


def _tag_url(service: Mapping[str, Any]) -> str:
    for one in service["status"].get("traffic", ()):
        if one.get("tag") == TAG:
            return str(one["url"])
    raise DeployError(f"the service gave its tag {TAG} no address; look at its traffic, then deploy again")


def _answering(service: Mapping[str, Any]) -> dict[str, int]:
    """Percent of the requests by revision, as the service really has them now."""
    shares: dict[str, int] = {}
    for one in service.get("status", {}).get("traffic", ()):
        if one.get("percent"):
            name = one.get("revisionName") or service["status"].get("latestReadyRevisionName", "")
            shares[name] = shares.get(name, 0) + one["percent"]
    return shares


def _told(shares: Mapping[str, int]) -> str:
    return (
        ", ".join(f"{name} ({percent} %)" if percent < 100 else name for name, percent in shares.items()) or "nothing"
    )
