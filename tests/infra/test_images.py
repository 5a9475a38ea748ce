"""The files that images and stacks are made from: linted by the ecosystem's tools, and true to the code they start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Any

import psycopg
import pytest
import yaml
from conftest import days_ago, replace_database
from packaging.requirements import Requirement

from infra import package
from infra.aws.target import parameter
from infra.aws.template import load
from infra.cloud_run.target import FILES
from infra.function_settings import PLAIN, SECRETS

INFRA = Path(__file__).parents[2] / "infra"
IMAGES = INFRA / "images"
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
FUNCTION_IMAGES = [file for file in DOCKERFILES if file.name.startswith("function-")]


def instructions(file: Path) -> list[tuple[str, str]]:
    """`(instruction, the rest)` of a Dockerfile, continued lines joined, comments left out."""
    text = "\n".join(line for line in file.read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines if line.strip()]


def test_there_is_an_image_for_each_part() -> None:
    assert {file.stem for file in DOCKERFILES} == {"function-cpu", "function-gpu", "orchestration"}


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_hadolint_finds_nothing(file: Path) -> None:
    tool = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([tool, "--no-color", str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_an_image_is_pinned_runs_as_nobody_in_particular_and_says_whether_it_is_well(file: Path) -> None:
    found = instructions(file)
    bases = [rest.split()[0] for name, rest in found if name == "FROM" and rest.split()[0] != "scratch"]
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base) for base in bases), bases
    last = max(place for place, (name, _) in enumerate(found) if name == "FROM")
    final = found[last:]
    users = [rest for name, rest in final if name == "USER"]
    assert users == ["10001"]
    assert [name for name, _ in final].index("USER") < max(
        place for place, (name, _) in enumerate(final) if name in ("ENTRYPOINT", "CMD")
    )
    assert sum(name == "HEALTHCHECK" for name, _ in final) == 1
    for name, rest in found:
        if name == "RUN" and "pip install" in rest:
            assert "-c constraints.txt" in rest or re.search(r"install .*\btorch==[\d.]+$", rest), rest
    assert not [rest for name, rest in found if name == "ENV" and "URL=" in rest]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_everything_that_is_copied_is_there(file: Path) -> None:
    for name, rest in instructions(file):
        words = [word for word in rest.split() if not word.startswith("--")]
        if name == "COPY" and "--from" not in rest:
            assert [word for word in words[:-1] if not (INFRA.parent / word).exists()] == []


@pytest.mark.parametrize("file", FUNCTION_IMAGES, ids=lambda file: file.stem)
def test_a_function_s_image_is_made_by_the_packages_recipe(file: Path) -> None:
    runs = [rest for name, rest in instructions(file) if name == "RUN"]
    assert any(f"python -m infra.package /opt/larder --extra {file.stem} --python 3.11" in rest for rest in runs)


def test_the_recipe_needs_nothing_but_what_its_image_has_copied(tmp_path: Path) -> None:
    sources = [
        rest.split()[:-1]
        for name, rest in instructions(IMAGES / "function-cpu.Dockerfile")
        if name == "COPY" and "--from" not in rest
    ]
    for source in [word for words in sources for word in words if not word.startswith("infra/images")]:
        target = tmp_path / source
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(INFRA.parent / source)
    code = "import sys; sys.path.insert(0, '.'); import infra.package as p; print(p.requirements('function-cpu')[0])"
    # -I and -S: no installed package is in reach, as in the image.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("numpy")


@pytest.mark.parametrize(
    ("api", "wanted"),
    [
        ("127.0.0.1:9001", "-m awslambdaric inference.handlers.aws_lambda.handler"),
        ("", "-m inference.handlers.asgi --host 0.0.0.0 --port 9090"),
    ],
)
def test_the_container_opens_the_door_that_its_platform_has(tmp_path: Path, api: str, wanted: str) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/bin:/usr/bin",
        "PORT": "9090",
        **({"AWS_LAMBDA_RUNTIME_API": api} if api else {}),
    }
    done = subprocess.run([IMAGES / "start-function"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == wanted
    for word in wanted.split():
        if word.startswith("inference."):
            assert (INFRA.parent / Path(*word.removesuffix(".handler").split("."))).with_suffix(".py").exists()


@pytest.fixture
def answering() -> Iterator[HTTPServer]:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Health)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_healthcheck_follows_what_health_says(answering: HTTPServer, status: int, code: int) -> None:
    answering.status = status  # type: ignore[attr-defined]
    environment = {**os.environ, "PORT": str(answering.server_address[1])}
    done = subprocess.run([sys.executable, IMAGES / "healthy"], env=environment, capture_output=True, check=False)
    assert done.returncode == code


def test_everything_a_function_needs_is_pinned() -> None:
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (INFRA.parent / "constraints.txt").read_text().splitlines()
    }
    waiting = [(Requirement(one), "") for one in package.requirements(package.CPU)]
    seen: set[tuple[str, str]] = set()
    while waiting:
        one, extra = waiting.pop()
        if one.marker and not one.marker.evaluate({"extra": extra}):
            continue
        name = one.name.lower().replace("_", "-")
        assert name in pins, f"{name} is not in constraints.txt"
        # The CPU build is not installed here; both builds ask for the same.
        asks = metadata.requires(name.replace("onnxruntime", "onnxruntime-gpu")) or ()
        for wanted in {"", *one.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in asks]
    assert {"onnxruntime", "psycopg-binary", "botocore", "protobuf"} <= {name for name, _ in seen}


def test_the_gpu_s_function_has_the_libraries_it_needs_and_no_cudnn() -> None:
    names = {Requirement(one).name: one for one in package.requirements(package.GPU)}
    assert {"onnxruntime-gpu", "nvidia-cublas", "nvidia-curand", "nvidia-cuda-runtime"} <= set(names)
    assert "onnxruntime" not in names
    assert not [name for name in names if "cudnn" in name]
    assert all("==" in names[name] for name in names if name.startswith("nvidia"))


def test_the_functions_requirements_are_listed_once() -> None:
    extras = tomllib.loads((INFRA.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [extras[name][0] for name in ("function-cpu", "function-gpu", "inference")] == ["larder[function]"] * 3


@pytest.fixture
def compose() -> Any:
    loaded = yaml.safe_load((INFRA / "compose.yaml").read_text())
    return {name: part for name, part in loaded.items() if not name.startswith("x-")}


class TestCompose:
    def test_it_follows_the_compose_specification(self, compose: Any) -> None:
        validate(compose)
        compose["services"]["function"]["restrat"] = "always"
        with pytest.raises(ValueError, match="restrat"):
            validate(compose)

    def test_the_stack_is_whole(self, compose: Any) -> None:
        assert set(compose["services"]) >= {
            "postgres",
            "webserver",
            "daemon",
            "code-server",
            "function",
            "collector",
            "grafana",
        }

    def test_images_are_pinned_and_ports_are_this_machines_own(self, compose: Any) -> None:
        for name, service in compose["services"].items():
            if "build" in service:
                assert (INFRA.parent / service["build"]["dockerfile"]).exists(), name
            else:
                assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", service["image"]), service["image"]
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name

    def test_every_file_that_is_mounted_is_there(self, compose: Any) -> None:
        if not (INFRA / "observability" / "collector.yaml").exists():
            pytest.skip("needs infra/observability/collector.yaml")
        mounts = [
            mount
            for service in compose["services"].values()
            for mount in service.get("volumes", ())
            if mount.startswith("./")
        ]
        assert len(mounts) >= 8
        assert [mount for mount in mounts if not (INFRA / mount.split(":")[0]).is_file()] == []

    def test_volumes_and_dependencies_are_declared(self, compose: Any) -> None:
        for service in compose["services"].values():
            assert set(service.get("depends_on", ())) <= set(compose["services"])
            named = {mount.split(":")[0] for mount in service.get("volumes", ()) if not mount.startswith(".")}
            assert named <= set(compose["volumes"])


def validate(compose: dict[str, Any]) -> None:
    """Raises ValueError if `compose` is not what the compose specification says."""
    from compose_spec import PyCompose

    read = PyCompose.from_yaml(yaml.safe_dump(compose))
    read.validate()
    read.validate_networks()
    read.validate_volumes()


def test_dagsters_production_settings_are_an_instance_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres_url: str
) -> None:
    import dagster as dg

    # Beside the product's database: both count their migrations in a table of the same name.
    name = f"dagster_{os.getpid()}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", replace_database(postgres_url, name))
    (tmp_path / "dagster.yaml").write_text((INFRA / "dagster" / "production.yaml").read_text())
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert type(instance.run_storage).__name__ == "PostgresRunStorage"
        assert type(instance.run_coordinator).__name__ == "QueuedRunCoordinator"
        assert instance.run_monitoring_enabled
        assert not instance.telemetry_enabled
        assert instance.get_runs() == []


def test_runs_belong_to_the_instance_of_production_where_there_is_one(
    larder_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infra.deployment import Deployment
    from infra.ui import prepare_dagster

    record = Deployment("shop", None, days_ago(30).date())
    monkeypatch.setenv("DAGSTER_HOME", "/opt/dagster")
    monkeypatch.setenv("DEPLOYMENT", "another")
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "postgresql://db/dagster")
    prepare_dagster(record)
    assert (os.environ["DAGSTER_HOME"], os.environ["DEPLOYMENT"]) == ("/opt/dagster", "shop")
    monkeypatch.delenv("DAGSTER_POSTGRES_URL")
    prepare_dagster(record)
    assert os.environ["DAGSTER_HOME"] == str(record.dagster_home)


def test_the_workspace_names_the_code_server_of_compose() -> None:
    workspace = yaml.safe_load((INFRA / "dagster" / "workspace.yaml").read_text())
    (server,) = (entry["grpc_server"] for entry in workspace["load_from"])
    code_server = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]["code-server"]
    assert str(server["port"]) in code_server["command"]
    assert server["host"] == {"env": "LARDER_CODE_SERVER"}


@pytest.mark.parametrize("gpu", ["no", "yes"])
def test_service_files_are_what_google_describes(gpu: str) -> None:
    import google_schema

    class Given(dict[str, str]):
        def __missing__(self, name: str) -> str:
            return "8" if name == "TIMEOUT_SECONDS" else "text"

    service = yaml.safe_load(Template(FILES[gpu].read_text()).substitute(Given()))
    assert google_schema.faults(service) == []
    service["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    assert google_schema.faults(service) == ["Service.spec.template.spec.containers[0].imagee is not known"]


@pytest.fixture
def template() -> Any:
    return load((INFRA / "aws" / "function.yaml").read_text())


class TestTemplate:
    def test_cfn_lint_finds_nothing(self) -> None:
        tool = Path(sys.executable).with_name("cfn-lint")
        done = subprocess.run([tool, str(INFRA / "aws" / "function.yaml")], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")

    def test_the_role_may_do_what_a_function_needs_and_nothing_else(self, template: Any) -> None:
        documents = [policy["PolicyDocument"] for policy in template["Resources"]["Role"]["Properties"]["Policies"]]
        documents += [
            one["Properties"]["PolicyDocument"]
            for one in template["Resources"].values()
            if one["Type"] == "AWS::IAM::Policy"
        ]
        statements = [statement for document in documents for statement in document["Statement"]]
        actions = {
            action
            for one in statements
            for action in ([one["Action"]] if isinstance(one["Action"], str) else one["Action"])
        }
        assert actions == {
            "logs:CreateLogStream", "logs:PutLogEvents", "s3:GetObject", "s3:ListBucket", "sqs:ReceiveMessage",
            "sqs:DeleteMessage", "sqs:GetQueueAttributes", "ec2:CreateNetworkInterface", "ec2:DescribeNetworkInterfaces",
            "ec2:DescribeSubnets", "ec2:DeleteNetworkInterface",
        }  # fmt: skip
        assert all(one["Resource"] != "*" for one in statements if "ec2:DescribeSubnets" not in one["Action"])

    def test_the_zip_is_made_for_the_python_that_runs_it(self, template: Any) -> None:
        runtime = template["Resources"]["Function"]["Properties"]["Runtime"]["Fn::If"][2]
        assert runtime == f"python{package.LAMBDA_PYTHON}"

    def test_what_callers_reach_is_the_alias(self, template: Any) -> None:
        resources = template["Resources"]
        assert resources["Url"]["Properties"]["Qualifier"] == resources["Live"]["Properties"]["Name"] == "live"
        assert resources["ApiIntegration"]["Properties"]["IntegrationUri"] == {"Ref": "Live"}
        assert resources["EventsMapping"]["Properties"]["FunctionName"] == {"Ref": "Live"}

    def test_events_that_cannot_be_stored_end_in_the_dead_letter_queue(self, template: Any) -> None:
        policy = template["Resources"]["EventsQueue"]["Properties"]["RedrivePolicy"]
        assert policy["deadLetterTargetArn"] == {"Fn::GetAtt": ["DeadEvents", "Arn"]}
        assert template["Resources"]["EventsMapping"]["Properties"]["FunctionResponseTypes"] == [
            "ReportBatchItemFailures"
        ]

    def test_no_secret_is_a_parameter(self, template: Any) -> None:
        variables = template["Resources"]["Function"]["Properties"]["Environment"]["Variables"]
        assert json.dumps(variables["DATABASE_URL"]).count("resolve:secretsmanager") == 1
        # The language model's URL may hold no user: `inference.chat.Chat` refuses one.
        assert not [
            name
            for name in template["Parameters"]
            if re.search("password|key$|url$", name, re.IGNORECASE) and name not in ("CodeKey", "LlmUrl")
        ]
        for name in SECRETS:
            assert json.dumps(variables[name]).count("resolve:secretsmanager") == 1, name

    def test_every_parameter_is_given_by_the_command(self, template: Any) -> None:
        source = (INFRA / "aws" / "target.py").read_text()
        made = {parameter(name) for name in PLAIN}
        made |= {f"{parameter(name)}{part}" for name in SECRETS.values() for part in ("Arn", "Version")}
        assert made <= set(template["Parameters"])
        written = [name for name in template["Parameters"] if name not in made and name != "LogDays"]
        assert [name for name in written if f'"{name}"' not in source] == []
