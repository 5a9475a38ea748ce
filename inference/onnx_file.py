"""What an ONNX file would make ONNX Runtime load and run, read before it does: operator domains and files beside it.

The `onnx` library is no part of a function, so the few fields that matter are read from the protobuf wire format.
Field numbers: onnx.proto3 of ONNX 1.16, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from schemas.errors import ArtifactError

KNOWN_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"})
"""Whose operators ONNX Runtime has built in. Any other comes from a library that somebody would have to load."""
_DEPTH = 64
"""Graphs within graphs; ours have none."""
_EXTERNAL = 1

# message -> field number -> name of the message in it
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR = "model", "graph", "node", "attribute", "tensor"
_FUNCTION, _SPARSE, _OPSET, _ENTRY, _TRAINING = "function", "sparse tensor", "opset", "entry", "training"
_INSIDE: dict[str, dict[int, str]] = {
    _MODEL: {7: _GRAPH, 8: _OPSET, 20: _TRAINING, 25: _FUNCTION},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _TENSOR: {13: _ENTRY},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _FUNCTION: {7: _NODE, 9: _OPSET, 11: _ATTRIBUTE},
}
_DOMAIN = {_NODE: 7, _OPSET: 1, _FUNCTION: 10}


@dataclass(slots=True)
class OnnxFile:
    """The `domains` of a file's operators and the `locations` of weights that lie outside it."""

    domains: set[str] = field(default_factory=set)
    locations: set[str] = field(default_factory=set)
    has_graph: bool = False


def read(data: bytes) -> OnnxFile:
    """What `data` refers to. Raises ArtifactError if it is no ONNX model."""
    found = OnnxFile()
    try:
        _walk(memoryview(data), _MODEL, found, 0)
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"this is no ONNX model ({error}); export it again") from None
    if not found.has_graph:
        raise ArtifactError("this is no ONNX model (it has no graph); export it again")
    return found


def check(data: bytes, name: str, beside: Collection[str] = ()) -> OnnxFile:
    """Raise ArtifactError unless file `name` with the content `data` may be loaded.

    It may use ONNX Runtime's own operators only, and of other files only those in `beside`: its artefact's, which are
    verified with it.
    """
    try:
        found = read(data)
    except ArtifactError as error:
        raise ArtifactError(f"{name}: {error}") from None
    if unknown := sorted(found.domains - KNOWN_DOMAINS):
        raise ArtifactError(f"{name} uses operators of {unknown[0]!r}, which this code does not load; export it again")
    if outside := sorted(found.locations - set(beside)):
        raise ArtifactError(f"{name} takes weights from {outside[0]!r}, no file of its artefact; export it again")
    return found


def _walk(data: memoryview, message: str, found: OnnxFile, depth: int) -> None:
    if depth > _DEPTH:
        raise ValueError("graphs within graphs without an end")
    inside, domain = _INSIDE.get(message, {}), _DOMAIN.get(message)
    external, entries = False, []
    for number, wire, value in _fields(data):
        if wire == 0:
            external = external or (message == _TENSOR and number == 14 and value == _EXTERNAL)
            continue
        if not isinstance(value, memoryview):
            continue
        if number == domain:
            found.domains.add(bytes(value).decode("utf-8"))
        elif (kind := inside.get(number)) == _ENTRY:
            entries.append(_entry(value))
        elif kind is not None:
            found.has_graph = found.has_graph or kind == _GRAPH
            _walk(value, kind, found, depth + 1)
    if external:
        # Without a location there is nothing to hold against the artefact's files.
        found.locations.add(dict(entries).get("location", "(nowhere)"))


def _entry(data: memoryview) -> tuple[str, str]:
    parts = {
        number: bytes(value).decode("utf-8") for number, _, value in _fields(data) if isinstance(value, memoryview)
    }
    return parts.get(1, ""), parts.get(2, "")


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview | int]]:
    """`(number, wire type, value)` of each field of a message: bytes as a view, a varint as a number."""
    place, end = 0, len(data)
    while place < end:
        tag, place = _varint(data, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, wire, value
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if place + size > end:
            raise ValueError("it ends in the middle of a field")
        yield number, wire, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number without an end")
