"""AWS as a target: files to S3, the stack, a version of the function, the alias; what would change; the way back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference import aws
from inference.declared import stopped_place
from infra import package, release
from infra.aws import function as functions
from infra.aws.function import Function
from infra.aws.stack import Stack
from infra.deploy_settings import DeploySettings
from infra.function_settings import PLAIN, SECRETS
from infra.release import Progress, Pushed, Release
from schemas.errors import DeployError


@contextmanager
def _told() -> Iterator[None]:
    """What boto3 raises, as a DeployError that names the way out."""
    from botocore import exceptions as boto

    try:
        yield
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.TokenRetrievalError) as error:
        raise DeployError(
            f"there are no AWS credentials to deploy with ({error}); log in (aws sso login) and name the profile in "
            "AWS_PROFILE, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except boto.NoRegionError as error:
        raise DeployError("no AWS region is set; set AWS_REGION, such as eu-central-1") from error
    except boto.ProfileNotFound as error:
        raise DeployError(f"{error}; set AWS_PROFILE to one of `aws configure list-profiles`") from error
    except boto.ClientError as error:
        about = error.response.get("Error", {})
        denied = about.get("Code") in ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation")
        way_out = (
            "give the role that deploys the right to it"
            if denied
            else "mend that, then deploy again: it goes on from here"
        )
        raise DeployError(
            f"AWS refused {error.operation_name} ({about.get('Code')}): {about.get('Message')}; {way_out}"
        ) from error
    except boto.WaiterError as error:
        raise DeployError(f"AWS was not ready in time: {error}; deploy again: it goes on from here") from error
    except (boto.EndpointConnectionError, boto.HTTPClientError) as error:
        raise DeployError(f"AWS cannot be reached: {error}; check network and region") from error


def parameter(variable: str) -> str:
    """The template's parameter for `variable`: LARDER_LLM_URL is LlmUrl."""
    return "".join(part.capitalize() for part in variable.removeprefix("LARDER_").split("_"))


@dataclass(slots=True)
class Aws:
    """One deployment's function in one account and region."""

    settings: DeploySettings
    session: Any
    account: str

    @classmethod
    def open(cls, settings: DeploySettings) -> Aws:
        """Raises DeployError without credentials or a region."""
        with _told():
            session = aws.session()
            if not session.region_name:
                raise DeployError("no AWS region is set; set AWS_REGION, such as eu-central-1")
            account = session.client("sts").get_caller_identity()["Account"]
        return cls(settings, session, account)

    @property
    def place(self) -> str:
        return f"AWS account {self.account}, region {self.session.region_name}"

    @property
    def _bucket(self) -> str:
        return self.settings.artifacts_url.removeprefix("s3://").partition("/")[0]

    @property
    def _prefix(self) -> str:
        return self.settings.artifacts_url.removeprefix("s3://").partition("/")[2]

    @property
    def _stack(self) -> Stack:
        return Stack(self.session.client("cloudformation"), self.settings.name)

    @property
    def _function(self) -> Function:
        return Function(
            self.session.client("lambda"),
            self.session.client("cloudwatch"),
            self.settings.name,
            self.settings.smoke_key,
        )

    def plan(self, released: Release) -> list[str]:
        """What `deploy` would change, one line each; empty if nothing. Changes nothing itself."""
        with _told(), release.gathered(released) as folder:
            lines: list[str] = []
            waiting = [file for file in self._missing(released, folder) if not file.there]
            if waiting:
                size = sum(file.size_bytes for file in waiting) / 1e6
                lines.append(
                    f"upload {len(waiting)} files ({size:.1f} MB) of model {released.version} to {self.settings.artifacts_url}"
                )
            key = self._package_key(folder)
            if key and release.head(self.session.client("s3"), self._bucket, key) is None:
                lines.append(f"build the function's package and upload it to s3://{self._bucket}/{key}")
            lines += [f"store s3://{self._bucket}/{name}" for name in self._undeclared()]
            parameters, stack = self._parameters(released, key), self._stack
            if stack.describe() is None:
                lines.append(f"create the stack {self.settings.name} with, as far as its settings ask for them:")
                lines += [f"  {resource}" for resource in stack.resources()]
                lines.append("publish the function's first version, and point the alias live at it")
                return lines
            if not stack.is_as(parameters):
                lines += [f"set {line}" for line in stack.changed_parameters(parameters)]
                lines += stack.preview(parameters)
                lines.append(f"publish a new version of {self.settings.name}")
            live, newest = self._function.live(), self._function.newest()
            if live is not None and (len(lines) > bool(waiting) or live.weights or newest != live.version):
                share = f", {self.settings.canary_rate:.0%} of the requests first" if self.settings.canary_rate else ""
                lines.append(
                    f"move the alias live from version {live.version} to the new one, after a smoke test{share}"
                )
            return lines

    def deploy(self, released: Release, carrier: Mapping[str, str], progress: Progress) -> bool:
        """Bring the function to `released` and these settings; False if nothing had to change.

        Every step looks first at what is there, so an interrupted deployment goes on where it stopped. Raises DeployError.
        """
        with _told(), release.gathered(released) as folder:
            changed = self._push(released, folder, progress)
            key = self._package_key(folder)
            if key:
                changed |= self._package(folder, key, progress)
            for name, content in self._undeclared().items():
                self.session.client("s3").put_object(Bucket=self._bucket, Key=name, Body=content)
                progress(f"  s3://{self._bucket}/{name} stored")
                changed = True
            changed |= self._stack.apply(self._parameters(released, key), progress)
            function = self._function
            version = function.publish(f"model {released.version}")
            changed |= functions.shift(
                function,
                version,
                released.version,
                canary_rate=self.settings.canary_rate,
                canary_seconds=self.settings.canary_seconds,
                smoke_seconds=self.settings.smoke_seconds,
                carrier=carrier,
                progress=progress,
            )
            return changed

    def roll_back(self, progress: Progress) -> str:
        """Let the function's version before answer again. Raises DeployError if there is none."""
        with _told():
            return functions.roll_back(self._function, progress)

    def urls(self) -> dict[str, str]:
        """Where the function is reached, by kind of door."""
        with _told():
            outputs = self._stack.outputs()
        return {name: outputs[name] for name in ("Url", "ApiUrl", "EventsQueueUrl") if name in outputs}

    def _missing(self, released: Release, folder: Path) -> list[Pushed]:
        if released.artifacts_url.rstrip("/") == self.settings.artifacts_url:
            return []  # it was released there
        return release.missing(self.session.client("s3"), folder, self._bucket, self._prefix)

    def _push(self, released: Release, folder: Path, progress: Progress) -> bool:
        count = release.push(self.session.client("s3"), self._missing(released, folder), self._bucket)
        if count:
            progress(f"  {count} files of model {released.version} uploaded to {self.settings.artifacts_url}")
        return count > 0

    def _package_key(self, folder: Path) -> str | None:
        """Where the package lies that holds what is in `folder`; None when an image takes its place."""
        if self.settings.image:
            return None
        return f"{self._prefix}/functions/{package.key(package.CPU, package.LAMBDA_PYTHON, folder)}.zip"

    def _package(self, folder: Path, key: str, progress: Progress) -> bool:
        client = self.session.client("s3")
        if release.head(client, self._bucket, key) is not None:
            return False
        progress("  building the function's package")
        with tempfile.TemporaryDirectory(prefix="larder-package-") as temporary:
            made, packed = Path(temporary) / "package", Path(temporary) / "function.zip"
            package.build(made, package.CPU, package.LAMBDA_PYTHON, folder)
            package.make_zip(made, packed)
            client.upload_file(str(packed), self._bucket, key)
            size = package.size_bytes(made) / 1e6
            progress(f"  package of {size:.0f} MB ({packed.stat().st_size / 1e6:.0f} MB packed) uploaded to {key}")
        return True

    def _parameters(self, released: Release, key: str | None) -> dict[str, str]:
        given = self.settings
        secrets: dict[str, str] = {}
        for told, named in SECRETS.items():
            arn, version = self._secret(given.secrets[told], named) if told in given.secrets else ("", "")
            name = parameter(named)
            secrets |= {f"{name}Arn": arn, f"{name}Version": version}
        return {
            "Name": given.name,
            "CodeBucket": self._bucket if key else "none",
            "CodeKey": key or "none",
            "ImageUri": given.image,
            "ArtifactsBucket": self._bucket,
            "ArtifactsPrefix": self._prefix,
            "ModelVersion": released.version,
            **secrets,
            **{parameter(name): given.plain.get(name, "") for name in PLAIN},
            "Rules": self._url_of(given.rules),
            "Experiments": self._url_of(given.experiments),
            "Access": given.access,
            "ConsentDefault": given.consent_default,
            "MemoryMb": f"{given.memory_mb:.0f}",
            "TimeoutSeconds": f"{given.timeout_seconds:.0f}",
            "Door": given.door,
            "UrlAuth": given.url_auth,
            "Events": given.events,
            "OtlpEndpoint": given.otlp_endpoint,
            "SubnetIds": given.subnets,
            "SecurityGroupIds": given.security_groups,
            "AlarmTopicArn": given.alarm_topic,
        }

    def _url_of(self, name: str) -> str:
        return f"{self.settings.artifacts_url}/{name}" if name else ""

    def _undeclared(self) -> dict[str, bytes]:
        """Keys and contents of the objects that the function reads what is declared by, as far as they are not there.

        The record of what is over is one: an object that is missing is refused to a role that may not list the whole
        bucket, and what was refused tells nothing.
        """
        given, client = self.settings, self.session.client("s3")
        wanted: dict[str, bytes] = {}
        if given.rules:
            wanted[f"{self._prefix}/{given.rules}"] = given.rules_content
        if given.experiments:
            wanted[f"{self._prefix}/{stopped_place(given.experiments)}"] = b"{}\n"
        return {key: content for key, content in wanted.items() if release.head(client, self._bucket, key) is None}

    def _secret(self, name: str, variable: str) -> tuple[str, str]:
        """ARN and current version of the secret `name`, which `variable` says; its text is never read here."""
        from botocore.exceptions import ClientError

        try:
            found = self.session.client("secretsmanager").describe_secret(SecretId=name)
        except ClientError as error:
            if error.response["Error"]["Code"] != "ResourceNotFoundException":
                raise
            raise DeployError(
                f"there is no secret {name!r} in {self.place}; create it, or name another in {variable}"
            ) from error
        current = [version for version, stages in found["VersionIdsToStages"].items() if "AWSCURRENT" in stages]
        if not current:
            raise DeployError(f"the secret {name!r} has no value yet; store one in it")
        return found["ARN"], current[0]
