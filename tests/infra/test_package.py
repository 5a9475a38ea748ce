"""The function's package: small enough, whole, the same for the same content."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from infra import package
from schemas.errors import DeployError

BUDGET_BYTES = 250_000_000
"""Of the function on a CPU as it is installed, model and encoder included."""
MODEL_AND_ENCODER_BYTES = 60_000_000
"""Kept free for them: the encoder for wishes has 34 MB, the rest is for a model's graphs and vectors."""

USES_IT = """
import sys
sys.path.insert(0, sys.argv[1])
import boto3, botocore.config, numpy, onnxruntime, psycopg, tokenizers
import awslambdaric.bootstrap
import inference.handlers.asgi, inference.handlers.aws_lambda, inference.runtime
from importlib import metadata
from inference import telemetry
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
OTLPSpanExporter(endpoint="http://127.0.0.1:1")
assert psycopg.pq.__impl__ == "binary", psycopg.pq.__impl__
assert "CPUExecutionProvider" in onnxruntime.get_available_providers()
boto3.client("s3", region_name="eu-central-1", aws_access_key_id="a", aws_secret_access_key="b")
boto3.client("sts", region_name="eu-central-1")
tokenizers.Tokenizer.from_str('{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, '
    '"pre_tokenizer": null, "post_processor": null, "decoder": null, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}')
from schemas import prompts
assert prompts.versions()
print(metadata.version("larder"))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package for this Python, installed from the index as for a release."""
    folder = tmp_path_factory.mktemp("package") / "function"
    package.build(folder, package.CPU, f"{sys.version_info[0]}.{sys.version_info[1]}")
    return folder


def test_the_function_fits_its_budget(built: Path) -> None:
    size = package.size_bytes(built)
    assert 100_000_000 < size <= BUDGET_BYTES - MODEL_AND_ENCODER_BYTES, f"{size / 1e6:.1f} MB"


def test_what_is_left_is_all_that_a_function_loads(built: Path) -> None:
    # -S: no installed package stands in for one that is missing.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", USES_IT, str(built)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "0.1.0"
    assert not (built / "infra").exists()
    assert not (built / "orchestration").exists()
    assert not list(built.glob("huggingface_hub*"))
    assert list((built / "inference" / "__pycache__").glob("recommend.*.pyc"))
    assert (built / "inference" / "sql" / "pick_candidates.sql").exists()


def test_the_same_folder_gives_the_same_zip(tmp_path: Path) -> None:
    for name, order in (("one", ("a.py", "b/c.py")), ("two", ("b/c.py", "a.py"))):
        for file in order:
            target = tmp_path / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(file)
        package.make_zip(tmp_path / name, tmp_path / f"{name}.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as packed:
        assert packed.namelist() == ["a.py", "b/c.py"]


def test_what_lambda_would_refuse_is_refused_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "large").write_bytes(b"x" * 2000)
    monkeypatch.setattr(package, "LAMBDA_UNZIPPED_BYTES", 1999)
    with pytest.raises(DeployError, match="set LARDER_IMAGE"):
        package.make_zip(tmp_path / "package", tmp_path / "f.zip")
    assert [file.name for file in tmp_path.iterdir()] == ["package"]


def test_a_packages_key_follows_its_content(tmp_path: Path) -> None:
    model = tmp_path / "models" / "ranker" / "v1"
    model.mkdir(parents=True)
    (model / "manifest.json").write_text(json.dumps({"seed": 1}))
    first = package.key(package.CPU, "3.12", tmp_path)
    assert first == package.key(package.CPU, "3.12", tmp_path)
    assert first != package.key(package.GPU, "3.12", tmp_path)
    assert first != package.key(package.CPU, "3.13", tmp_path)
    (model / "manifest.json").write_text(json.dumps({"seed": 2}))
    assert first != package.key(package.CPU, "3.12", tmp_path)


def test_a_folder_that_holds_something_is_not_built_into(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(DeployError, match="is not empty"):
        package.build(tmp_path)


def test_an_unknown_extra_names_those_there_are() -> None:
    with pytest.raises(DeployError, match="function-cpu or function-gpu"):
        package.requirements("function-tpu")
