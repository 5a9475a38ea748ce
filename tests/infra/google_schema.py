"""Google's own description of Cloud Run's API, to hold a service file against: unknown fields and wrong types are faults."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "array": list,
    "object": dict,
}


@cache
def _schemas() -> dict[str, Any]:
    import googleapiclient

    folder = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
    described: dict[str, Any] = json.loads((folder / "run.v1.json").read_text())["schemas"]
    return described


def faults(value: Any, schema: str = "Service") -> list[str]:
    """What is wrong with `value` as a `schema` of run.v1, by path; empty if nothing."""
    return _faults(value, {"$ref": schema}, schema)


def _faults(value: Any, schema: dict[str, Any], path: str) -> list[str]:
    if "$ref" in schema:
        schema = _schemas()[schema["$ref"]]
    kind = schema.get("type", "any")
    if kind == "any":
        return []
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return [f"{path} is {type(value).__name__}, not {kind}"]
    if kind == "array":
        return [fault for n, one in enumerate(value) for fault in _faults(one, schema["items"], f"{path}[{n}]")]
    if kind != "object":
        known = schema.get("enum")
        return [f"{path} is {value!r}, not one of {known}"] if known and value not in known else []
    found = []
    for name, one in value.items():
        described = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
        found += _faults(one, described, f"{path}.{name}") if described else [f"{path}.{name} is not known"]
    return found
