"""Vectors in Postgres: item texts encoded when they change, item vectors per model version, recall of the index."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector import HalfVector, Vector
from pgvector.psycopg import register_vector

from inference.artifacts import verify
from inference.encoder import TextEncoder
from inference.ranker import Ranker
from schemas import prompts
from schemas.errors import DefinitionError
from schemas.events import Item
from schemas.manifest import ITEM_RESIDUALS
from schemas.ranker import TEXT_DIM

ENCODE_BATCH = 256
EXACT_LIMIT = 20_000
"""Up to this many rows an exact scan is as fast as the index, and always right."""


@dataclass(frozen=True, slots=True)
class VectorReport:
    """What a refresh of vectors did."""

    items: int
    encoded: int
    kept: int


def refresh_text_vectors(
    connection: psycopg.Connection[Any],
    encoder: TextEncoder,
    *,
    template: str = prompts.ITEM_TEMPLATE,
    progress: Callable[[str], None] = lambda _: None,
) -> VectorReport:
    """Encode the texts that are new or changed, batch by batch; each batch is committed, so a repeat goes on from there."""
    register_vector(connection)
    wording = prompts.load(template)
    rows = connection.execute(
        "SELECT i.item_id, i.title, i.description, i.categories, v.text_hash FROM items AS i "
        "LEFT JOIN text_vectors AS v USING (item_id) ORDER BY i.item_id"
    ).fetchall()
    connection.commit()
    todo: list[tuple[str, str, str]] = []
    for item_id, title, description, categories, known in rows:
        text = prompts.render_item(wording, Item(item_id, title, description, tuple(categories)))
        digest = prompts.text_hash(f"{template} {encoder.version}", text)
        if digest != known:
            todo.append((item_id, text, digest))
    # Texts of one length together: padding is what makes a mixed batch slow.
    todo.sort(key=lambda entry: len(entry[1]))
    for begin in range(0, len(todo), ENCODE_BATCH):
        part = todo[begin : begin + ENCODE_BATCH]
        vectors = encoder.encode([text for _, text, _ in part])
        with connection.transaction():
            connection.execute(
                f"CREATE TEMP TABLE incoming (item_id text, text_hash text, vector vector({TEXT_DIM})) ON COMMIT DROP"
            )
            with connection.cursor().copy("COPY incoming FROM STDIN WITH (FORMAT BINARY)") as copy:
                copy.set_types(["text", "text", "vector"])
                for (item_id, _, digest), vector in zip(part, vectors, strict=True):
                    copy.write_row((item_id, digest, Vector(vector)))
            connection.execute(
                "INSERT INTO text_vectors (item_id, text_hash, vector) SELECT item_id, text_hash, vector FROM incoming "
                "ON CONFLICT (item_id) DO UPDATE SET text_hash = excluded.text_hash, vector = excluded.vector, updated_at = now()"
            )
        progress(f"{min(begin + ENCODE_BATCH, len(todo)):,} of {len(todo):,} texts encoded")
    return VectorReport(len(rows), len(todo), len(rows) - len(todo))


def index_recall(connection: psycopg.Connection[Any], *, k: int = 10, queries: int = 100, seed: int = 0) -> float:
    """Recall@k of the HNSW index over text vectors against exact search, over `queries` items chosen by seed."""
    register_vector(connection)
    rows = connection.execute("SELECT item_id, vector FROM text_vectors ORDER BY item_id").fetchall()
    if not rows:
        return 1.0
    chosen = np.random.default_rng(seed).permutation(len(rows))[:queries]
    hits = wanted = 0
    with connection.transaction():
        for index in chosen:
            found: dict[bool, set[str]] = {}
            for exact in (True, False):
                connection.execute(f"SET LOCAL enable_indexscan = {'off' if exact else 'on'}")
                connection.execute(f"SET LOCAL enable_seqscan = {'on' if exact else 'off'}")
                found[exact] = {
                    item_id
                    for (item_id,) in connection.execute(
                        "SELECT item_id FROM text_vectors ORDER BY vector <=> %s LIMIT %s", (rows[index][1], k)
                    )
                }
            hits += len(found[True] & found[False])
            wanted += len(found[True])
    return hits / wanted


def load_text_vectors(connection: psycopg.Connection[Any], item_ids: NDArray[np.str_]) -> NDArray[np.float32]:
    """`(items, 384)` in the order of `item_ids`. Raises DefinitionError if an item has none."""
    register_vector(connection)
    found = dict(connection.execute("SELECT item_id, vector FROM text_vectors").fetchall())
    missing = [item_id for item_id in item_ids.tolist() if item_id not in found]
    if missing:
        raise DefinitionError(
            f"{len(missing)} items have no text vector (first: {missing[0]!r}); materialise text_vectors first"
        )
    return np.stack([np.asarray(_plain(found[item_id]), np.float32) for item_id in item_ids.tolist()])


def feature_fingerprint_of(folder: Path) -> str:
    """Of the features that the model in `folder` learned. Raises ArtifactError if its files were changed."""
    return verify(folder).feature_fingerprint


def refresh_item_vectors(connection: psycopg.Connection[Any], folder: Path) -> VectorReport:
    """Bring the item vectors of the model in `folder` up to the catalogue: new and changed items only, in one transaction."""
    register_vector(connection)
    ranker = Ranker(folder)
    with np.load(folder / ITEM_RESIDUALS, allow_pickle=False) as arrays:
        residuals = dict(zip(arrays["item_ids"].tolist(), arrays["residuals"], strict=True))
    version = ranker.version
    if not re.fullmatch(r"[0-9a-f]{16}", version):
        raise DefinitionError(f"model version {version!r} is not 16 hex digits")
    partition = f"item_vectors_{version}"
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (partition,))
        connection.execute(
            f"CREATE TABLE IF NOT EXISTS {partition} PARTITION OF item_vectors FOR VALUES IN ('{version}')"
        )
        rows = connection.execute(
            "SELECT t.item_id, t.vector, t.text_hash FROM text_vectors AS t LEFT JOIN item_vectors AS v "
            "ON v.item_id = t.item_id AND v.model_version = %s WHERE v.text_hash IS DISTINCT FROM t.text_hash ORDER BY t.item_id",
            (version,),
        ).fetchall()
        if rows:
            projected = ranker.project(np.stack([np.asarray(_plain(vector), np.float32) for _, vector, _ in rows]))
            none = np.zeros(ranker.dim, np.float32)
            vectors = projected + np.stack([residuals.get(item_id, none) for item_id, _, _ in rows])
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            connection.execute(
                "DELETE FROM item_vectors WHERE model_version = %s AND item_id = ANY(%s)",
                (version, [row[0] for row in rows]),
            )
            with connection.cursor().copy(
                "COPY item_vectors (model_version, item_id, vector, text_hash) FROM STDIN WITH (FORMAT BINARY)"
            ) as copy:
                copy.set_types(["text", "text", "halfvec", "text"])
                for (item_id, _, digest), vector in zip(rows, vectors, strict=True):
                    copy.write_row((version, item_id, HalfVector(vector), digest))
        (total,) = connection.execute(
            "SELECT count(*) FROM item_vectors WHERE model_version = %s", (version,)
        ).fetchone() or (0,)
        if total > EXACT_LIMIT:
            connection.execute(
                f"CREATE INDEX IF NOT EXISTS ix_{partition}_hnsw ON {partition} "
                f"USING hnsw ((vector::halfvec({ranker.dim})) halfvec_ip_ops)"
            )
        if rows:
            # The first requests come before autovacuum does.
            connection.execute(f"ANALYZE {partition}")
    return VectorReport(total, len(rows), total - len(rows))


def _plain(vector: Any) -> NDArray[np.float32]:
    return vector.to_numpy() if hasattr(vector, "to_numpy") else np.asarray(vector, np.float32)
