"""The SQL files beside the code, and how vectors and lists of keys travel in and out of Postgres."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray


@cache
def statement(name: str) -> str:
    """The SQL in `inference/sql/<name>.sql`."""
    return (resources.files("inference") / "sql" / f"{name}.sql").read_text(encoding="utf-8")


def half_vectors(raw: Sequence[bytes]) -> NDArray[np.float32]:
    """`(n, d)`: pgvector halfvecs as Postgres sends them in binary: int16 dimension, int16 unused, big-endian float16s."""
    if not raw:
        return np.zeros((0, 0), np.float32)
    return np.frombuffer(b"".join(raw), ">f2").reshape(len(raw), -1)[:, 2:].astype(np.float32)


def vector_literal(vector: NDArray[np.float32] | None) -> str:
    """`vector (d,)` as pgvector reads it."""
    assert vector is not None
    return "[" + ",".join(f"{value:.7g}" for value in vector.tolist()) + "]"


def text_array(texts: Sequence[str]) -> str:
    """`texts` as Postgres reads an array: many times faster than a driver that looks at each of them."""
    joined = '","'.join(texts)
    if "\\" in joined or joined.count('"') != 2 * (len(texts) - 1):
        joined = '","'.join(text.replace("\\", "\\\\").replace('"', '\\"') for text in texts)
    return '{"' + joined + '"}' if texts else "{}"
