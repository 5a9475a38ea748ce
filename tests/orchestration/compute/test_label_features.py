"""Training sets on any label table: every row comes back with what was known at its instant, from any file, or an error."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from conftest import TODAY, days_ago
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_windows import CATEGORIES, ITEMS, USERS, build, events_of, oracle
from worlds import ListSource

from orchestration import training_set
from orchestration.compute import labels as label_tables
from orchestration.compute.forget import forget
from orchestration.compute.ingest import ingest
from orchestration.compute.label_features import read_version, write_label_features
from orchestration.compute.lake import Lake
from orchestration.compute.tombstones import Overtaken
from schemas.errors import RequestError
from schemas.events import Event
from schemas.features import FeatureView
from schemas.views import VIEWS

INSTANT = pa.timestamp("us", tz="UTC")


def load(connection: psycopg.Connection, lake: Lake, events: list[Event]) -> None:
    ingest(ListSource(events, list(ITEMS)), lake, connection, now=TODAY)
    connection.commit()


def table(rows: list[tuple[str | None, str | None, str | None, datetime]]) -> pa.Table:
    """A label table with every key column, an instant and a column of its own."""
    users, items, categories, at = zip(*rows, strict=True)
    return pa.table(
        {
            "note": pa.array(range(len(rows)), pa.int8()),
            "user_id": pa.array(users, pa.string()),
            "item_id": pa.array(items, pa.string()),
            "category": pa.array(categories, pa.string()),
            "at": pa.array(at, INSTANT),
        }
    )


def expected(view: FeatureView, events: list[Event], keys: tuple[str | None, ...], at: datetime) -> list[float | None]:
    """The oracle's features in their own units; NULL where a key is or nothing is held."""
    encoded = None if None in keys else oracle(view, events, tuple(str(key) for key in keys), at)
    if encoded is None:
        return [None] * len(view.features)
    return [
        None if math.isnan(value) else math.expm1(value) if feature.transform == "log1p" else value
        for feature, value in zip(view.features, encoded, strict=True)
    ]


def assert_answers(found: pa.Table, events: list[Event], known: bool = True) -> None:
    """Every row of `found` holds what the oracle gives for its keys and instant, from the events that were known."""
    for row in found.to_pylist():
        at = row["at"]
        then = [event for event in events if not known or (event.known_at or event.occurred_at) <= at]
        for view in VIEWS:
            wanted = expected(view, then, tuple(row[key] for key in view.entity.keys), at)
            for feature, value in zip(view.features, wanted, strict=True):
                got = row[f"{view.name}.{feature.name}"]
                where = f"{view.name}.{feature.name} of {row}"
                assert got == (None if value is None else pytest.approx(value, rel=1e-9, abs=1e-6)), where


keys_or_none = st.tuples(
    st.sampled_from([*USERS, None, "nobody"]), st.sampled_from([*CATEGORIES, None]), st.sampled_from(["a", "b", None])
)
# Ties with events (all in whole seconds of the same few), and summer time's beginning and end are among the days.
instants = st.tuples(st.integers(0, 201), st.sampled_from([0, 1, 43_200, 86_399]), st.booleans())


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=events_of,
    late=st.lists(st.sampled_from([0, 0, 1, 86_400, 3 * 86_400]), min_size=40, max_size=40),
    asked=st.lists(st.tuples(keys_or_none, instants), min_size=1, max_size=12),
    batch_rows=st.sampled_from([3, 100_000]),
    known=st.booleans(),
)
def test_every_label_reads_what_the_oracle_gives(
    database: str,
    tmp_path_factory: pytest.TempPathFactory,
    rows: list,
    late: list,
    asked: list,
    batch_rows: int,
    known: bool,
) -> None:
    folder = tmp_path_factory.mktemp("world")
    events = [
        Event(
            e.event_id, e.user_id, e.item_id, e.kind, e.value, e.occurred_at, e.occurred_at + timedelta(seconds=seconds)
        )
        for e, seconds in zip(build(rows), late, strict=False)
    ]
    # Every label twice: duplicates are rows too.
    labels = table(
        [(*keys, days_ago(days) + timedelta(seconds=s, microseconds=us)) for keys, (days, s, us) in [*asked, *asked]]
    )
    lake = Lake((folder / "lake").as_uri())
    with pytest.MonkeyPatch.context() as patch, psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        patch.setattr(label_tables, "BATCH_ROWS", batch_rows)
        for name in ("items", "lake_files", "ingests", "recent_events", "event_keys", "user_history"):
            connection.execute(f"DELETE FROM {name}")
        load(connection, lake, events)
        report = write_label_features(labels, folder / "out.parquet", lake=lake, connection=connection, known_at=known)
    found = pq.read_table(folder / "out.parquet")
    assert report.rows == found.num_rows == labels.num_rows
    assert found.select(labels.schema.names).equals(labels)
    assert_answers(found, events, known)


@pytest.fixture
def filled(connection: psycopg.Connection, lake: Lake) -> list[Event]:
    events = build(
        [
            ("1", "1", "rating", 5.0, (10, 43_200)),
            ("1", "12", "rating", 2.0, (9, 1)),
            ("1", "11", "view", None, (8, 86_399)),
            ("11", "2", "like", 4.0, (8, 0)),
            ("12", "1", "view", None, (3, 43_200)),
        ]
    )
    load(connection, lake, events)
    return events


def test_times_of_several_zones_are_the_same_instants(
    filled: list[Event], connection: psycopg.Connection, lake: Lake, tmp_path: Path
) -> None:
    """The night the clocks went back in Berlin holds 02:30 twice; text, zones and units all mean one instant each."""
    when = [days_ago(8), datetime(2025, 10, 26, 0, 30, tzinfo=UTC), datetime(2025, 10, 26, 1, 30, tzinfo=UTC)]
    berlin, india = ZoneInfo("Europe/Berlin"), timezone(timedelta(hours=5, minutes=30))
    texts = [when[0].astimezone(india).isoformat(), *(at.astimezone(berlin).isoformat() for at in when[1:])]
    assert texts[1][:16] == texts[2][:16]
    ways = {
        "utc": pa.array(when, INSTANT),
        "berlin": pa.array(when, pa.timestamp("ns", tz="Europe/Berlin")),
        "seconds": pa.array(when, pa.timestamp("s", tz="Asia/Kolkata")),
        "text": pa.array(texts),
        "naive": pa.array([at.replace(tzinfo=None) for at in when], pa.timestamp("us")),
    }
    for name, column in ways.items():
        out = tmp_path / f"{name}.parquet"
        labels = pa.table({"user_id": ["1", "1", "1"], "item_id": ["1"] * 3, "category": ["a"] * 3, "at": column})
        report = write_label_features(labels, out, lake=lake, connection=connection)
        found = pq.read_table(out)
        assert found["at"].to_pylist() == when, name
        assert report.naive_times == (3 if name == "naive" else 0), name
        assert_answers(found, filled)


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_file_of_any_kind(ending: str, connection: psycopg.Connection, lake: Lake, tmp_path: Path) -> None:
    """Ids that look like numbers stay text, missing ones stay missing, other columns come back as they were."""
    load(
        connection,
        lake,
        [Event("e", "007", "1", "view", 3.0, days_ago(2)), Event("f", "7", "1", "view", 3.0, days_ago(2))],
    )
    rows = [
        {"user_id": "007", "at": days_ago(1).isoformat(), "label": 1, "weight": 0.5},
        {"user_id": None, "at": days_ago(1).isoformat(), "label": 0, "weight": 1.5},
        {"user_id": "7", "at": f"{days_ago(3):%Y-%m-%d %H:%M:%S}", "label": 1, "weight": 2.5},
    ]
    file = tmp_path / f"labels.{ending}"
    if ending == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        made = pa.Table.from_pylist(rows)
        pq.write_table(made, file) if ending == "parquet" else pyarrow.csv.write_csv(made, file)
    report = write_label_features(
        file, tmp_path / "out.parquet", lake=lake, connection=connection, views=["user_activity"]
    )
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.schema.names[:4] == ["user_id", "at", "label", "weight"]
    assert found["user_id"].to_pylist() == ["007", None, "7"]
    assert found["at"].to_pylist() == [days_ago(1), days_ago(1), days_ago(3)]
    assert (found["label"].to_pylist(), found["weight"].to_pylist()) == ([1, 0, 1], [0.5, 1.5, 2.5])
    assert found["user_activity.events_7d"].to_pylist() == [1.0, None, None]
    assert report.naive_times == 1


def test_the_version_says_what_it_was_built_from(
    filled: list[Event], connection: psycopg.Connection, lake: Lake, tmp_path: Path
) -> None:
    labels = table([("1", "1", "a", days_ago(1))])

    def write(name: str, **options: object) -> str:
        report = write_label_features(labels, tmp_path / name, lake=lake, connection=connection, **options)  # type: ignore[arg-type]
        described = json.loads((tmp_path / f"{name}.json").read_text())
        assert described.items() >= read_version(tmp_path / name).items()
        assert described["views"] == {
            view.name: view.definition_hash for view in VIEWS if view.name in described["views"]
        }
        assert described["version"] == report.version.version
        return report.version.version

    first = write("first.parquet")
    assert write("again.parquet") == first
    described = read_version(tmp_path / "first.parquet")
    assert described["lake_rows"] == len(filled)
    assert datetime.fromisoformat(described["newest_known_at"]) == max(event.occurred_at for event in filled)
    others = [write("off.parquet", known_at=False), write("one.parquet", views=["item_activity"])]
    load_more = [*filled, Event("more", "1", "1", "view", None, days_ago(4))]
    ingest(ListSource(load_more, list(ITEMS), version="2"), lake, connection, now=TODAY)
    connection.commit()
    others.append(write("more.parquet"))
    connection.execute("UPDATE items SET categories = '{b}' WHERE item_id = '1'")
    connection.commit()
    others.append(write("catalogue.parquet"))
    assert len({first, *others}) == 5
    plain = tmp_path / "plain.parquet"
    pq.write_table(labels, plain)
    with pytest.raises(RequestError, match="does not say what it was built from"):
        read_version(plain)


def test_no_labels_give_no_rows(
    filled: list[Event], connection: psycopg.Connection, lake: Lake, tmp_path: Path
) -> None:
    labels = table([("1", "1", "a", days_ago(1))]).slice(0, 0)
    report = write_label_features(labels, tmp_path / "out.parquet", lake=lake, connection=connection)
    assert (report.rows, pq.read_table(tmp_path / "out.parquet").num_rows) == (0, 0)


def test_a_column_called_ts_is_the_time() -> None:
    assert label_tables.open_labels(pa.table({"user_id": ["1"], "ts": ["2030-01-31T12:00:00Z"]})).time == "ts"


BASE = {"user_id": ["1"], "item_id": ["1"], "at": [days_ago(1)]}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"user_id": ["1"]}, {}, "has no time column: none of user_id is a timestamp"),
        ({"user_id": ["1"], "seen": [days_ago(1)], "paid": [days_ago(1)]}, {}, r"several columns that may be a label's time: seen, paid; name the one you mean \(TIME=column with make"),
        (BASE, {"time": "att"}, r"has no column 'att' \(did you mean 'at'\?\)"),
        (BASE | {"at": [1_700_000_000]}, {}, "'at' is int64, which does not say in which unit"),
        (BASE | {"at": ["yesterday"]}, {}, "row 1 has 'yesterday' in the time column 'at'"),
        (BASE | {"at": pa.array([None], INSTANT)}, {}, "row 1 has nothing in the time column 'at'"),
        ({"at": [days_ago(1)], "who": ["1"]}, {}, "has no key column of any view; its columns are at, who"),
        ({"userid": ["1"], "item_id": ["1"], "at": [days_ago(1)]}, {}, r"no column 'user_id' \(did you mean 'userid'\?\)"),
        (BASE, {"views": ["user_affinity"]}, "keyed by user_id, category, and the label table has no column 'category'"),
        (BASE, {"views": ["user_activty"]}, r"no view 'user_activty' \(did you mean user_activity\?\)"),
        (BASE | {"user_id": [1.5]}, {}, "the key column 'user_id' is double, and keys are text"),
        (BASE | {"user_activity.events_7d": [1]}, {}, "has a column 'user_activity.events_7d', as the feature"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_refused_and_nothing_is_written(
    columns: dict, options: dict, message: str, connection: psycopg.Connection, lake: Lake, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(RequestError, match=message):
        write_label_features(pa.table(columns), folder / "set.parquet", lake=lake, connection=connection, **options)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.txt", "user_id,at\n", "not a label table by its name; give a file that ends in .parquet, .csv"),
        ("labels.parquet", "PAR0", "cannot be read as Parquet"),
        ("labels.jsonl", '{"user_id": 1, "at"', "cannot be read"),
        ("labels.csv", "user_id,when\n1,soon\n", "has no time column: none of user_id, when"),
        ("labels.csv", "user_id,at\n1,2030-02-30T00:00:00Z\n", "row 1 has '2030-02-30T00:00:00Z'"),
        ("missing.csv", None, "cannot be read: No such file or directory"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(
    name: str, text: str | None, message: str, connection: psycopg.Connection, lake: Lake, tmp_path: Path
) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(RequestError, match=message):
        write_label_features(file, tmp_path / "out.parquet", lake=lake, connection=connection)
    assert not list(tmp_path.glob("*out.parquet*"))


def test_where_it_may_be_written(
    filled: list[Event], connection: psycopg.Connection, lake: Lake, tmp_path: Path
) -> None:
    labels = table([("1", "1", "a", days_ago(1))])
    there = tmp_path / "there.parquet"
    there.write_text("mine")
    for out, message in (
        (there, "exists; name another file"),
        (tmp_path / "no" / "set.parquet", "is not there; make it first"),
        (tmp_path / "set.csv", "does not end in .parquet"),
    ):
        with pytest.raises(RequestError, match=message):
            write_label_features(labels, out, lake=lake, connection=connection)
    assert there.read_text() == "mine"


def test_what_fails_in_the_middle_leaves_nothing(
    filled: list[Event], connection: psycopg.Connection, lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_tables, "BATCH_ROWS", 2)
    labels = pa.table({"user_id": ["1"] * 5, "at": [*[days_ago(1).isoformat()] * 4, "never"]})
    seen: list[str] = []
    with pytest.raises(RequestError, match="row 5 has 'never'"):
        write_label_features(labels, tmp_path / "o.parquet", lake=lake, connection=connection, progress=seen.append)
    assert seen[-1] == "4 of 5 labels answered"
    assert not list(tmp_path.glob("*.parquet*"))


def test_nobody_is_brought_back_by_a_training_set(
    filled: list[Event], database: str, connection: psycopg.Connection, lake: Lake, tmp_path: Path
) -> None:
    def forgets(line: str) -> None:
        if "answered" in line:
            forget("11", url=database, lake=lake, artifacts_url=(tmp_path / "artifacts").as_uri())

    labels = table([("1", "1", "a", days_ago(1))])
    with pytest.raises(Overtaken):
        write_label_features(labels, tmp_path / "o.parquet", lake=lake, connection=connection, progress=forgets)
    assert not list(tmp_path.glob("*.parquet*"))


def test_a_large_table_is_streamed(
    filled: list[Event], connection: psycopg.Connection, lake: Lake, tmp_path: Path
) -> None:
    """Row groups are written as they are answered: no more than one batch is held."""
    rows = 250_000
    labels = tmp_path / "labels.parquet"
    rng = np.random.default_rng(0)
    at = np.array([(days_ago(12) + timedelta(hours=n)).timestamp() * 1e6 for n in range(24 * 12)], np.int64)
    made = {"user_id": rng.choice(USERS, rows), "at": pa.array(rng.choice(at, rows), INSTANT)}
    pq.write_table(pa.table(made), labels)
    report = write_label_features(labels, tmp_path / "o.parquet", lake=lake, connection=connection)
    assert report.rows == rows
    assert pq.ParquetFile(tmp_path / "o.parquet").metadata.num_row_groups == 3
    found = pq.read_table(tmp_path / "o.parquet")
    for place in rng.integers(0, rows, 50).tolist():
        row = found.slice(place, 1).to_pylist()[0]
        view = VIEWS[0]
        wanted = expected(view, filled, (row["user_id"],), row["at"])
        assert row["user_activity.events_7d"] == (None if wanted[0] is None else pytest.approx(wanted[0]))


def test_the_command(
    larder_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from conftest import ingested

    labels, out = tmp_path / "labels.csv", tmp_path / "set.parquet"
    labels.write_text(f"user_id,at\nuser-00001,{days_ago(1):%Y-%m-%d %H:%M:%S}\nuser-00002,{days_ago(1).isoformat()}\n")
    arguments = ["--labels", str(labels), "--out", str(out), "--views", "user_activity"]
    assert training_set.main(arguments) == 1
    assert "run `make run` first" in capsys.readouterr().out
    ingested(larder_home, monkeypatch, 5)
    assert training_set.main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 rows, 7 features of user_activity" in said
    assert "1 times of the column at have no zone and were taken as UTC" in said
    assert pq.read_table(out)["user_id"].to_pylist() == ["user-00001", "user-00002"]
    assert training_set.main(arguments) == 1
    assert "exists; name another file" in capsys.readouterr().out
