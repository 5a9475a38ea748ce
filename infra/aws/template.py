"""CloudFormation's YAML as plain dictionaries: `!Ref x` becomes `{"Ref": "x"}`, `!Sub` and its kin `{"Fn::Sub": …}`."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # the library is untyped
    pass


def _intrinsic(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    value: Any
    if isinstance(node, yaml.ScalarNode):
        value = loader.construct_scalar(node)
        if suffix == "GetAtt":
            value = value.split(".", 1)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        assert isinstance(node, yaml.MappingNode)
        value = loader.construct_mapping(node, deep=True)
    return {suffix if suffix in ("Ref", "Condition") else f"Fn::{suffix}": value}


_Loader.add_multi_constructor("!", _intrinsic)


def load(text: str) -> dict[str, Any]:
    """The template `text`."""
    loaded: dict[str, Any] = yaml.load(text, Loader=_Loader)
    return loaded
