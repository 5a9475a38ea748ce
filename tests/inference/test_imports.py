"""What a function must not drag along: importing all of `inference` loads no training library."""

from __future__ import annotations

import json
import subprocess
import sys

FORBIDDEN = ("dagster", "torch", "transformers", "optimum", "onnx", "sqlalchemy", "alembic", "pandas", "boto3")
DOORS = {"inference.handlers.asgi", "inference.handlers.aws_lambda"}
TRACING = ("opentelemetry", "requests")

SCRIPT = """
import importlib, json, pkgutil, sys
import inference
names = [module.name for module in pkgutil.walk_packages(inference.__path__, "inference.")]
for name in names:
    importlib.import_module(name)
print(json.dumps([names, sorted(sys.modules)]))
"""


def test_the_package_loads_nothing_of_training_or_orchestration() -> None:
    # -I would hide the working tree; an empty environment hides what a shell has set for tracing.
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120, env={"PYTHONPATH": "."}
    ).stdout
    names, loaded = json.loads(output.splitlines()[-1])
    assert set(names) >= DOORS
    assert set(names) <= set(loaded)
    assert [name for name in FORBIDDEN if name in loaded] == []
    assert [name for name in TRACING if name in loaded] == []
