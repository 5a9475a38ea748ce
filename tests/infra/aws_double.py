"""A stand-in for AWS: moto's HTTP server, and in front of it what moto lacks.

- CloudFormation in moto knows no aliases, URLs, alarms and HTTP APIs: they are taken out of a template on its way, the
  original is given back by GetTemplate, and the alias is made as the template says, by moto's own Lambda API.
- Invocations run a real handler of ours in this process instead of a container; which one, the test says per version.
- Weights of an alias are kept by moto; which version answers an invocation of the alias is drawn here.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit
from xml.sax.saxutils import escape

from infra import package, release
from infra.aws.template import load
from infra.release import Release

Handler = Callable[[Any, Any], Any]

MOTO_KNOWS = {
    "AWS::Logs::LogGroup",
    "AWS::IAM::Role",
    "AWS::IAM::Policy",
    "AWS::Lambda::Function",
    "AWS::Lambda::Version",
    "AWS::SQS::Queue",
}


@dataclass
class AwsDouble:
    """The address to use as AWS_ENDPOINT_URL, the handlers by version, and every call as (service call, what about)."""

    url: str = ""
    handlers: dict[str, Handler] = field(default_factory=dict)
    carriers: list[dict[str, str]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    templates: dict[str, str] = field(default_factory=dict)
    proposed: dict[str, str] = field(default_factory=dict)
    moto_url: str = ""

    def writes(self) -> list[str]:
        """The calls so far that change something, forgotten once told."""
        told = [
            call for call in self.calls if not re.match(r"(GET|HEAD)|.*(Describe|Get|List)[A-Z]|.*/invocations", call)
        ]
        self.calls.clear()
        return told

    def client(self, service: str) -> Any:
        """boto3's client, straight to moto: not among `calls`."""
        import boto3

        return boto3.client(service, endpoint_url=self.moto_url)


class _Front(ThreadingHTTPServer):
    daemon_threads = True
    double: AwsDouble


class _Requests(BaseHTTPRequestHandler):
    server: _Front
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        double = self.server.double
        body = self._body()
        action = self.headers.get("X-Amz-Target", "").rpartition(".")[2]
        form = parse_qs(body.decode("latin-1"), keep_blank_values=True) if b"Action=" in body and not action else {}
        action = action or form.get("Action", [""])[0]
        double.calls.append(f"{self.command} {action or self.path}")
        invoked = re.fullmatch(r"/2015-03-31/functions/([^/]+)/invocations(?:\?Qualifier=(.+))?", self.path)
        if invoked:
            self._invoke(unquote(invoked[1]), unquote(invoked[2] or "$LATEST"), body)
            return
        stack = form.get("StackName", [""])[0].rpartition("/")[2]
        if action == "CreateChangeSet":
            double.proposed[stack] = form["TemplateBody"][0]
            form["TemplateBody"] = [json.dumps(_for_moto(form))]
            body = urlencode(form, doseq=True).encode()
        elif action == "GetTemplate" and stack in double.templates:
            text = escape(double.templates[stack])
            self._reply(
                200,
                f"<GetTemplateResponse><GetTemplateResult><TemplateBody>{text}</TemplateBody></GetTemplateResult></GetTemplateResponse>".encode(),
            )
            return
        status, headers, answer = self._forward(body)
        if action == "ExecuteChangeSet" and status == 200:
            double.templates[stack] = double.proposed[stack]
            _make_alias(double, stack)
        self._reply(status, answer, headers)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _handle

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        kept = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("content-length", "host", "connection", "transfer-encoding", "expect")
        }
        connection = http.client.HTTPConnection(urlsplit(self.server.double.moto_url).netloc)
        try:
            connection.request(self.command, self.path, body or None, kept)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _invoke(self, name: str, qualifier: str, body: bytes) -> None:
        double = self.server.double
        version = qualifier
        if not qualifier.isdigit():
            alias = double.client("lambda").get_alias(FunctionName=name, Name=qualifier)
            weights = (alias.get("RoutingConfig") or {}).get("AdditionalVersionWeights") or {}
            version = next(iter(weights), alias["FunctionVersion"])
        context = json.loads(base64.b64decode(self.headers.get("X-Amz-Client-Context", "e30=")))
        double.carriers.append(context.get("custom", {}))
        seen = SimpleNamespace(
            aws_request_id="r",
            client_context=SimpleNamespace(custom=context.get("custom", {})),
            get_remaining_time_in_millis=lambda: 10_000,
        )
        try:
            answer = double.handlers[version](json.loads(body), seen)
        except Exception as error:  # noqa: BLE001 - whatever a function dies of, its platform says so
            told = {"errorType": type(error).__name__, "errorMessage": str(error)}
            self._reply(200, json.dumps(told).encode(), {"X-Amz-Function-Error": "Unhandled"})
            return
        self._reply(200, answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            if name.lower() not in ("content-length", "connection", "date", "server", "transfer-encoding"):
                self.send_header(name, value)
        length = (headers or {}).get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _for_moto(form: dict[str, list[str]]) -> dict[str, Any]:
    """The proposed template as moto can use it: what it does not know left out, and parameters put in their places,
    because it compares two templates without them."""
    template = load(form["TemplateBody"][0])
    given = {
        form[name][0]: form[name.replace("ParameterKey", "ParameterValue")][0]
        for name in form
        if "ParameterKey" in name
    }
    values = {name: given.get(name, str(about.get("Default", ""))) for name, about in template["Parameters"].items()}
    lists = {name for name, about in template["Parameters"].items() if about["Type"] == "CommaDelimitedList"}
    template["Resources"] = {name: one for name, one in template["Resources"].items() if one["Type"] in MOTO_KNOWS}
    template["Outputs"] = {"RoleArn": template["Outputs"]["RoleArn"]}
    template.pop("Rules")
    for name in lists:
        # It gives an empty list back as another text than it was given.
        template["Parameters"][name]["Type"] = "String"
    for section in ("Resources", "Conditions"):
        template[section] = _filled_in(template[section], values, lists)
    return template


def _filled_in(value: Any, values: dict[str, str], lists: set[str]) -> Any:
    if isinstance(value, list):
        return [_filled_in(one, values, lists) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and value.get("Ref") in values:
        name = value["Ref"]
        return values[name].split(",") if name in lists else values[name]
    if len(value) == 1 and isinstance(value.get("Fn::Sub"), str):
        return {"Fn::Sub": re.sub(r"\$\{(\w+)\}", lambda found: values.get(found[1], found[0]), value["Fn::Sub"])}
    return {name: _filled_in(one, values, lists) for name, one in value.items()}


def _make_alias(double: AwsDouble, stack: str) -> None:
    client = double.client("lambda")
    found = double.client("cloudformation").describe_stacks(StackName=stack)["Stacks"][0]
    name = next(one["ParameterValue"] for one in found["Parameters"] if one["ParameterKey"] == "Name")
    if not client.list_aliases(FunctionName=name)["Aliases"]:
        about = load(double.templates[stack])["Resources"]["Live"]["Properties"]
        client.create_alias(
            FunctionName=name, Name=about["Name"], FunctionVersion="1", Description=about["Description"]
        )


AWS_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "eu-central-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "LARDER_DEPLOY_URL": "s3://larder-shop/shop",
    "LARDER_DATABASE_SECRET": "shop/database",
    "LARDER_CANARY_SECONDS": "0",
}
"""What a deployment to the double is told; AWS_ENDPOINT_URL is its `url`."""


def furnish(double: AwsDouble) -> None:
    """The bucket and the secret of AWS_ENVIRONMENT."""
    double.client("s3").create_bucket(
        Bucket="larder-shop", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
    )
    double.client("secretsmanager").create_secret(
        Name="shop/database", SecretString="postgresql://function:CANARY@db/shop"
    )


def put_package(double: AwsDouble, released: Release) -> None:
    """A package of `released` that was uploaded before: what `infra.package` makes takes long and is tested on its own."""
    with release.gathered(released) as folder:
        name = package.key(package.CPU, package.LAMBDA_PYTHON, folder)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        packed.writestr("model", released.version)
    double.client("s3").put_object(Bucket="larder-shop", Key=f"shop/functions/{name}.zip", Body=content.getvalue())


@contextmanager
def running_aws() -> Iterator[AwsDouble]:
    """The double, with moto behind it; both end with the block, and moto forgets everything."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    front = _Front(("127.0.0.1", 0), _Requests)
    front.double = AwsDouble(url=f"http://127.0.0.1:{front.server_address[1]}", moto_url=f"http://{host}:{port}")
    thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield front.double
    finally:
        front.shutdown()
        front.server_close()
        thread.join(10)
        request = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
        urllib.request.urlopen(request).close()
        moto.stop()
