"""What a PromQL query names: metrics and labels, by taking the query apart; and what the collector calls an instrument."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

UNITS = {"s": "seconds", "ms": "milliseconds", "By": "bytes", "1": "ratio"}
"""Of the translation that the collector's exporters and Prometheus share, what we use."""
_KEYWORDS = {
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "and",
    "or",
    "unless",
    "bool",
    "offset",
    "inf",
}
_SELECTOR = re.compile(r"(?<![\w:.])([a-zA-Z_:][\w:]*)(?![\w:])\s*(\{[^}]*\})?(?!\s*\()")
_MATCHER = re.compile(r'([a-zA-Z_]\w*)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")


@dataclass(frozen=True)
class Selector:
    """A metric of a query with its matchers `(label, operator, value)`."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]


def selectors(query: str) -> list[Selector]:
    """Every metric that `query` selects."""
    bare = re.sub(r"\[[^\]]*\]", "", _GROUPING.sub("", query))
    return [
        Selector(match[1], tuple(_MATCHER.findall(match[2] or "")))
        for match in _SELECTOR.finditer(bare)
        if match[1] not in _KEYWORDS
    ]


def grouped_by(query: str) -> set[str]:
    """The labels that `query` groups by."""
    return {label.strip() for group in _GROUPING.findall(query) for label in group.split(",") if label.strip()}


def prometheus_name(metric: Any) -> str:
    """The name of an OTLP metric after the collector: characters, unit, type; native histograms get no suffix."""
    name = re.sub(r"_+", "_", re.sub(r"[^a-zA-Z0-9:]", "_", metric.name)).strip("_")
    kind = metric.WhichOneof("data")
    unit = "" if metric.unit.startswith("{") else UNITS.get(metric.unit, metric.unit)
    if unit == "ratio" and kind != "gauge":
        unit = ""
    if unit and not name.endswith(f"_{unit}"):
        name += f"_{unit}"
    if kind == "sum" and metric.sum.is_monotonic:
        name = name.removesuffix("_total") + "_total"
    return name


def prometheus_label(name: str) -> str:
    """The name of an attribute as a label."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)


def label_value(value: Any) -> str:
    """An OTLP value as a label has it."""
    kind = value.WhichOneof("value")
    found = getattr(value, kind)
    return str(found).lower() if kind == "bool_value" else str(found)
