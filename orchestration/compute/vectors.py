"""Vectors in Postgres: item texts encoded when they change, item vectors per model version, recall of the index."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector import HalfVector, Vector
from pgvector.psycopg import register_vector

from inference import experiment
from inference.artifacts import verify
from inference.declared import Declared
from inference.encoder import TextEncoder
from inference.ranker import Ranker
from orchestration.compute.telling import Say, silent
from schemas import prompts
from schemas.errors import DefinitionError
from schemas.events import Item
from schemas.manifest import ITEM_RESIDUALS
from schemas.ranker import TEXT_DIM
from schemas.views import fingerprint

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""Takes n texts, gives `(n, 384) float32`."""
ENCODE_BATCH = 256
_ITEMS = (
    "(SELECT i.item_id, i.title, i.categories, concat_ws(' ', nullif(i.description, ''), nullif(e.about, '')) AS description "
    "FROM items AS i LEFT JOIN item_enrichments AS e USING (item_id))"
)
"""The catalogue as it is encoded: where a language model has said something of an item, that follows its description."""
KEPT_VERSIONS = 3
"""So many of the last versions that passed their gate learn of new items, beside what serves: a rollback goes to one."""
EXACT_LIMIT = 20_000
"""Up to this many rows an exact scan is as fast as the index, and always right."""


@dataclass(frozen=True, slots=True)
class VectorReport:
    """What a refresh of vectors did.

    `without_text` items have no text at all and share one vector, so only what people do tells them apart; `title_only`
    ones have neither description nor categories.
    """

    items: int
    encoded: int
    kept: int
    without_text: int = 0
    title_only: int = 0


def written_by(template: str, encoder_version: str) -> str:
    """What decides a text's vector beside the item: stands beside every text vector."""
    return f"{template} {encoder_version}"


def refresh_text_vectors(
    connection: psycopg.Connection[Any],
    encoder: TextEncoder,
    *,
    template: str = prompts.DEFAULTS["item"],
    progress: Say = silent,
) -> VectorReport:
    """Encode the texts that are new or changed, batch by batch; each batch is committed, so a repeat goes on from there.

    Another template encodes only what it writes differently: a text that stays the same keeps its vector.
    """
    register_vector(connection)
    wording, writer = prompts.load(template), written_by(template, encoder.version)
    rows = connection.execute(
        f"SELECT i.item_id, i.title, i.description, i.categories, v.text_hash FROM {_ITEMS} AS i "
        "LEFT JOIN text_vectors AS v USING (item_id) ORDER BY i.item_id"
    ).fetchall()
    connection.commit()
    todo: list[tuple[str, str, str]] = []
    without_text = title_only = 0
    for item_id, title, description, categories, known in rows:
        text = prompts.render_item(wording, Item(item_id, title, description, tuple(categories)))
        without_text += not text
        title_only += bool(title.strip()) and not description.strip() and not categories
        digest = prompts.text_hash(encoder.version, text)
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
                "INSERT INTO text_vectors (item_id, text_hash, vector, written_by) SELECT item_id, text_hash, vector, %s "
                "FROM incoming ON CONFLICT (item_id) DO UPDATE SET text_hash = excluded.text_hash, "
                "vector = excluded.vector, written_by = excluded.written_by, updated_at = now()",
                (writer,),
            )
        progress(f"{min(begin + ENCODE_BATCH, len(todo)):,} of {len(todo):,} texts encoded")
    with connection.transaction():
        # What reads the same in both wordings is as good as written by the new one.
        connection.execute(
            "UPDATE text_vectors SET written_by = %s WHERE written_by IS DISTINCT FROM %s AND item_id = ANY(%s)",
            (writer, writer, [row[0] for row in rows]),
        )
    return VectorReport(len(rows), len(todo), len(rows) - len(todo), without_text, title_only)


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


def load_text_vectors(
    connection: psycopg.Connection[Any], item_ids: NDArray[np.str_], writer: str
) -> NDArray[np.float32]:
    """`(items, 384)` in the order of `item_ids`. Raises DefinitionError if an item has none, or one not by `writer`."""
    register_vector(connection)
    found = {
        item_id: (vector, by)
        for item_id, vector, by in connection.execute("SELECT item_id, vector, written_by FROM text_vectors")
    }
    missing = [item_id for item_id in item_ids.tolist() if item_id not in found]
    if missing:
        raise DefinitionError(
            f"{len(missing)} items have no text vector (first: {missing[0]!r}); materialise text_vectors first"
        )
    if others := sorted({str(found[item_id][1]) for item_id in item_ids.tolist()} - {writer}):
        raise DefinitionError(
            f"text vectors were written by {', '.join(others)} (template and encoder), wanted are those by {writer}; "
            "materialise text_vectors first"
        )
    return np.stack([np.asarray(plain(found[item_id][0]), np.float32) for item_id in item_ids.tolist()])


def unless_known(connection: psycopg.Connection[Any], encoder: TextEncoder) -> Encode:
    """Encodes texts as `encoder` does, but for those whose vectors are in the database already."""
    register_vector(connection)

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        digests = {prompts.text_hash(encoder.version, text): text for text in texts}
        rows = connection.execute(
            "SELECT text_hash, vector FROM text_vectors WHERE text_hash = ANY(%s)", (list(digests),)
        ).fetchall()
        vectors = {digest: np.asarray(plain(vector), np.float32) for digest, vector in rows}
        missing = [digest for digest in digests if digest not in vectors]
        vectors |= zip(missing, encoder.encode([digests[digest] for digest in missing]), strict=True)
        return np.stack([vectors[prompts.text_hash(encoder.version, text)] for text in texts])

    return encode


def text_vectors_as(
    connection: psycopg.Connection[Any], item_ids: NDArray[np.str_], template: str, encoder: TextEncoder
) -> NDArray[np.float32]:
    """`(items, 384)` in the order of `item_ids`, as `template` writes them, whichever template is in use now."""
    wording = prompts.load(template)
    rows = connection.execute(f"SELECT item_id, title, description, categories FROM {_ITEMS} AS i").fetchall()
    items = {row[0]: Item(row[0], row[1], row[2], tuple(row[3])) for row in rows}
    return unless_known(connection, encoder)(
        [prompts.render_item(wording, items[item_id]) for item_id in item_ids.tolist()]
    )


def why_not_refreshed(folder: Path, encoder: TextEncoder) -> str | None:
    """Why the model in `folder` cannot be given vectors by this code; None if it can.

    Raises ArtifactError if its files were changed.
    """
    manifest = verify(folder)
    if manifest.feature_fingerprint != fingerprint():
        return (
            "it learned other features than schemas/views.py declares now, so it does not serve; "
            "the floor does until the next training (make run RETRAIN=1)"
        )
    if manifest.encoder_version != encoder.version:
        return (
            f"it learned from texts encoded by {manifest.encoder_version}, the encoder is now {encoder.version}; new and "
            "changed items are unknown to it until the next training (make run RETRAIN=1)"
        )
    if manifest.item_template not in prompts.versions("item"):
        return (
            f"its item template {manifest.item_template} is no longer among schemas/prompt_templates; put the file back, "
            "or train again (make run RETRAIN=1)"
        )
    return None


def versions_to_refresh(connection: psycopg.Connection[Any], also: Sequence[str] = ()) -> list[tuple[str, str]]:
    """`(version, path)` of the models that must know every item: the newest, which may be about to serve, the champion,
    the last `KEPT_VERSIONS` that passed their gate, so that a rollback finds them complete, and those in `also`.

    Raises DefinitionError if one of `also` is unknown.
    """
    rows = connection.execute(
        "SELECT version, path FROM model_versions WHERE version IN (SELECT version FROM model_aliases) "
        "OR version IN (SELECT version FROM model_versions ORDER BY created_at DESC LIMIT 1) OR version IN "
        "(SELECT m.version FROM model_versions AS m JOIN gate_records AS g USING (version) WHERE g.passed "
        "ORDER BY m.created_at DESC LIMIT %s) OR version = ANY(%s) ORDER BY created_at",
        (KEPT_VERSIONS, list(also)),
    ).fetchall()
    if unknown := sorted(set(also) - {version for version, _ in rows}):
        raise DefinitionError(f"there is no model version {', '.join(unknown)}; look into model_versions")
    return rows


def tried_versions(connection: psycopg.Connection[Any], place: str) -> list[str]:
    """The registered versions that experiments declared at `place` name; none where that cannot be used, which is what
    `GET /health` tells."""
    try:
        named = experiment.versions(Declared(place).changed() or (), datetime.now(UTC))
    except DefinitionError:
        return []
    rows = connection.execute("SELECT version FROM model_versions WHERE version = ANY(%s)", (list(named),))
    return [version for (version,) in rows]


def refresh_item_vectors(connection: psycopg.Connection[Any], folder: Path, encoder: TextEncoder) -> VectorReport:
    """Bring the item vectors of the model in `folder` up to the catalogue: new and changed items only, in one transaction.

    A model is only ever given texts as it learned them: where the text vectors at hand are another template's, its own
    are made here. Raises DefinitionError if that cannot be done.
    """
    if why := why_not_refreshed(folder, encoder):
        raise DefinitionError(f"model {verify(folder).version} cannot be given item vectors: {why}")
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
        rows = _outdated(connection, version, ranker.manifest.item_template, encoder)
        if rows:
            projected = ranker.project(np.stack([vector for _, vector, _ in rows]))
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


def _outdated(
    connection: psycopg.Connection[Any], version: str, template: str, encoder: TextEncoder
) -> list[tuple[str, NDArray[np.float32], str]]:
    """Items whose vectors model `version` lacks or has from another text: id, text vector by `template`, its hash."""
    writer = written_by(template, encoder.version)
    rows = connection.execute(
        "SELECT t.item_id, t.vector, t.text_hash FROM text_vectors AS t LEFT JOIN item_vectors AS v "
        "ON v.item_id = t.item_id AND v.model_version = %s "
        "WHERE t.written_by = %s AND v.text_hash IS DISTINCT FROM t.text_hash ORDER BY t.item_id",
        (version, writer),
    ).fetchall()
    found = [(item_id, np.asarray(plain(vector), np.float32), digest) for item_id, vector, digest in rows]
    others = connection.execute(
        f"SELECT i.item_id, i.title, i.description, i.categories, v.text_hash FROM {_ITEMS} AS i JOIN text_vectors AS t "
        "USING (item_id) LEFT JOIN item_vectors AS v ON v.item_id = i.item_id AND v.model_version = %s "
        "WHERE t.written_by IS DISTINCT FROM %s ORDER BY i.item_id",
        (version, writer),
    ).fetchall()
    wording = prompts.load(template)
    texts: dict[str, tuple[str, str]] = {}
    for item_id, title, description, categories, known in others:
        text = prompts.render_item(wording, Item(item_id, title, description, tuple(categories)))
        digest = prompts.text_hash(encoder.version, text)
        if digest != known:
            texts[item_id] = (text, digest)
    vectors = encoder.encode([text for text, _ in texts.values()])
    found += [(item_id, vector, digest) for (item_id, (_, digest)), vector in zip(texts.items(), vectors, strict=True)]
    return found


def plain(vector: Any) -> NDArray[np.float32]:
    """`(d,)`: a vector as the driver gives it, whatever class its adapter makes of it."""
    return vector.to_numpy() if hasattr(vector, "to_numpy") else np.asarray(vector, np.float32)
