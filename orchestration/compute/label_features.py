"""Training sets on any label table: every label row with the features of the asked views as known at its instant."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq

from orchestration.compute.labels import Labels, choose_views, open_labels
from orchestration.compute.lake import Lake
from orchestration.compute.point_in_time import PointInTime
from orchestration.compute.telling import Say, silent
from orchestration.compute.tombstones import count_erasures, no_erasure_since
from schemas.errors import LarderError, RequestError
from schemas.features import FeatureView

METADATA_KEY = b"larder.training_set"


@dataclass(frozen=True, slots=True)
class Version:
    """What a training set was built from. Equal `version`s hold equal rows.

    `views` gives each view's definition hash; `lake_rows`, `lake_days` and `newest_known_at` describe the events, whose
    files `lake_digest` names one and all; `catalogue_digest` is of the items' categories.
    """

    version: str
    labels: str
    labels_sha256: str
    time: str
    known_at: bool
    views: dict[str, str]
    features: list[str]
    lake_digest: str
    lake_rows: int
    lake_days: int
    newest_known_at: str | None
    catalogue_digest: str


@dataclass(frozen=True, slots=True)
class LabelFeaturesReport:
    """What was written: as many `rows` as there are labels. `naive_times` were taken as UTC."""

    rows: int
    naive_times: int
    null_rates: dict[str, float]
    size_bytes: int
    version: Version


def write_label_features(
    labels: Path | str | pa.Table,
    out: Path | str,
    *,
    lake: Lake,
    connection: psycopg.Connection[Any],
    views: Sequence[str] | None = None,
    time: str | None = None,
    known_at: bool = True,
    progress: Say = silent,
) -> LabelFeaturesReport:
    """Write the Parquet file `out`: every row of `labels`, in order, with its features as they were known at its instant.

    `labels` is a Parquet, CSV or JSONL file or an Arrow table with the key columns of the asked views, a column `time`
    (None: found by type or name; without a zone it is UTC) and whatever else it has. `views` None means every view whose
    keys the table has. Features are columns `view.feature` in their own units, NULL where nothing was known or a key is
    NULL. With `known_at=False` late events count from when they happened, as if they had never been late.

    What it was built from stands in the file's metadata and beside it, in `<out>.json`. Both files appear whole or not at
    all. Raises RequestError, before anything is written, for a table that does not fit or an `out` that exists, and
    Overtaken if somebody is forgotten meanwhile.
    """
    target = Path(out)
    _refuse_existing(target)
    table = open_labels(labels, time=time)
    chosen = choose_views(table, views)
    features = [f"{view.name}.{feature.name}" for view in chosen for feature in view.features]
    if taken := [name for name in features if name in table.schema.names]:
        raise RequestError(f"{table.name} has a column {taken[0]!r}, as the feature; rename it", field=taken[0])
    schema = pa.schema([*table.schema, *(pa.field(name, pa.float64()) for name in features)])
    seen = count_erasures(connection)
    progress(f"reading the lake for {', '.join(view.name for view in chosen)}")
    paths = lake.paths(connection).values()
    with lake.named(paths), PointInTime(lake, connection, known_at=known_at) as ask:
        version = _version(table, chosen, features, known_at, lake, connection, ask)
        connection.commit()  # nothing is held while the rows are computed
        rows, present = 0, [0] * len(features)
        with _whole(target) as temporary:
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for batch in _answered(ask, table, chosen, schema):
                    writer.write_table(batch)
                    rows += batch.num_rows
                    for place, name in enumerate(features):
                        present[place] += batch.num_rows - batch[name].null_count
                    progress(f"{rows:,}{f' of {table.rows:,}' if table.rows is not None else ''} labels answered")
                described = asdict(version) | {"rows": rows, "naive_times_taken_as_utc": table.naive_times}
                writer.add_key_value_metadata({METADATA_KEY: json.dumps(described).encode()})
            if table.rows is not None and rows != table.rows:
                raise LarderError(f"{table.rows} labels went in and {rows} rows came out; {target} was not written")
            sidecar = temporary.with_name(temporary.name + ".json")
            built = {"built_at": datetime.now(UTC).isoformat(timespec="seconds")}
            sidecar.write_text(json.dumps(described | built, indent=1) + "\n")
            with no_erasure_since(connection, seen):
                _refuse_existing(target)
                # The file comes last: where it is, what it was built from is there too.
                sidecar.replace(target.with_name(target.name + ".json"))
                temporary.replace(target)
    null_rates = {name: 1 - count / max(rows, 1) for name, count in zip(features, present, strict=True)}
    return LabelFeaturesReport(rows, table.naive_times, null_rates, target.stat().st_size, version)


def read_version(file: Path | str) -> dict[str, Any]:
    """What a written training set was built from, out of its metadata. Raises RequestError if it says nothing of it."""
    found = (pq.read_metadata(file).metadata or {}).get(METADATA_KEY)
    if found is None:
        raise RequestError(f"{file} does not say what it was built from: it is no training set of ours")
    described: dict[str, Any] = json.loads(found)
    return described


def _answered(ask: PointInTime, labels: Labels, views: Sequence[FeatureView], schema: pa.Schema) -> Iterator[pa.Table]:
    for batch in labels.batches():
        batch = batch.combine_chunks()
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        keys = {key: columns[key].combine_chunks() for key in labels.keys}
        at = columns[labels.time].combine_chunks()
        for view in views:
            values = ask.values(view, keys, at)
            for place, feature in enumerate(view.features):
                columns[f"{view.name}.{feature.name}"] = pa.array(values[:, place], from_pandas=True)  # NaN is NULL
        yield pa.table(columns, schema=schema)


def _version(
    labels: Labels,
    views: Sequence[FeatureView],
    features: list[str],
    known_at: bool,
    lake: Lake,
    connection: psycopg.Connection[Any],
    ask: PointInTime,
) -> Version:
    rows, days, newest = ask.lake_state()
    # A file of the lake never changes: its name stands for its events.
    files = sorted(path.removeprefix(lake.url.split("://", 1)[1]) for path in ask.files)
    lake_digest = _digest(files)
    catalogue = connection.execute('SELECT item_id, categories FROM items ORDER BY item_id COLLATE "C"').fetchall()
    catalogue_digest = _digest(json.dumps(row) for row in catalogue)
    hashes = {view.name: view.definition_hash for view in views}
    # The order of the views is the order of the columns.
    decisive = [labels.digest, labels.time, str(known_at), json.dumps(hashes), *features, lake_digest, catalogue_digest]
    return Version(
        version=_digest(decisive),
        labels=labels.name,
        labels_sha256=labels.digest,
        time=labels.time,
        known_at=known_at,
        views=hashes,
        features=features,
        lake_digest=lake_digest,
        lake_rows=rows,
        lake_days=days,
        newest_known_at=None if newest is None else newest.astimezone(UTC).isoformat(),
        catalogue_digest=catalogue_digest,
    )


def _digest(parts: Sequence[str] | Iterator[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise RequestError(f"{target} exists; name another file, or delete it first: training sets are not overwritten")
    if not target.parent.is_dir():
        raise RequestError(f"the folder {target.parent} of {target.name} is not there; make it first")
    if target.suffix != ".parquet":
        raise RequestError(f"{target} does not end in .parquet, which is what is written; name it so")


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A name beside `target` to write to; whatever is left there under it is deleted at the end."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield temporary
    finally:
        for left in (temporary, temporary.with_name(temporary.name + ".json")):
            left.unlink(missing_ok=True)
