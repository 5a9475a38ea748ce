"""Tables described by larder.toml: formats, times, bad rows, messages, S3."""

from __future__ import annotations

import json
import tomllib
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestration.sources import BadRow
from orchestration.sources.tabular import EXAMPLE, Tabular
from orchestration.sources.tabular_files import MAX_LINE_BYTES, MAX_RECORD_LINES
from schemas.errors import SourceError
from schemas.events import Event, Item, Person

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def describe(
    folder: Path,
    events: str,
    *,
    time: str = "iso",
    columns: str = 'user_id = "who", item_id = "what", occurred_at = "at"',
    rest: str = "",
) -> Tabular:
    """A source with one item and the given events file pattern."""
    if not (folder / "items.csv").exists():
        (folder / "items.csv").write_text("id,name\n1,Pear\n")
    (folder / "larder.toml").write_text(
        f'[events]\nfiles = "{events}"\ntime = "{time}"\ncolumns = {{ {columns} }}\n'
        f'[items]\nfiles = "items.csv"\ncolumns = {{ item_id = "id", title = "name" }}\n{rest}'
    )
    return Tabular(folder)


def good(source: Tabular) -> list[Event]:
    rows = list(source.events())
    assert not [row for row in rows if isinstance(row, BadRow)]
    return [row for row in rows if isinstance(row, Event)]


def test_the_same_events_from_each_format_are_equal(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"who": [1], "what": ["a"], "at": pa.array([NOON], pa.timestamp("ns", "UTC"))}), tmp_path / "e.parquet"
    )
    (tmp_path / "e.csv").write_text("what,who,at\na,1,2026-03-01T12:00:00\n")
    (tmp_path / "e.jsonl").write_text('{"who": 1.0, "what": "a", "at": "2026-03-01T13:00:00+01:00"}\n')
    found = [good(describe(tmp_path, f"e.{suffix}")) for suffix in ("parquet", "csv", "jsonl")]
    assert found[0] == found[1] == found[2]
    assert (found[0][0].user_id, found[0][0].kind, found[0][0].occurred_at) == ("1", "view", NOON)


@pytest.mark.parametrize(
    ("unit", "value"),
    [
        ("seconds", int(NOON.timestamp())),
        ("seconds", str(int(NOON.timestamp()))),
        ("milliseconds", int(NOON.timestamp() * 1e3)),
        ("microseconds", int(NOON.timestamp() * 1e6)),
        ("iso", "2026-03-01 12:00:00Z"),
        ("iso", NOON.astimezone(timezone(timedelta(hours=5))).isoformat()),
    ],
)
def test_time_units(tmp_path: Path, unit: str, value: object) -> None:
    (tmp_path / "e.jsonl").write_text(json.dumps({"who": "1", "what": "a", "at": value}))
    assert good(describe(tmp_path, "e.jsonl", time=unit))[0].occurred_at == NOON


@pytest.mark.parametrize(("unit", "other"), [("milliseconds", 1), ("seconds", 1000)])
def test_a_wrong_unit_is_a_bad_row_that_says_so(tmp_path: Path, unit: str, other: int) -> None:
    (tmp_path / "e.csv").write_text(f"who,what,at\n1,a,{int(NOON.timestamp()) * other}\n")
    (row,) = describe(tmp_path, "e.csv", time=unit).events()
    assert isinstance(row, BadRow)
    assert "not a time" in row.reason


def test_naive_parquet_time_is_utc_and_all_columns_are_read(tmp_path: Path) -> None:
    naive = NOON.replace(tzinfo=None)
    table = pa.table(
        {"e": ["x"], "who": ["1"], "what": ["a"], "at": [naive], "k": ["purchase"], "v": [2.5], "seen": [naive]}
    )
    pq.write_table(table, tmp_path / "e.parquet")
    columns = 'event_id = "e", user_id = "who", item_id = "what", occurred_at = "at", kind = "k", value = "v", known_at = "seen"'
    source = describe(tmp_path, "e.parquet", columns=columns)
    assert good(source) == [Event("x", "1", "a", "purchase", 2.5, NOON, NOON)]
    assert source.event_count() == 1
    assert source.time_range() == (NOON, NOON)


def test_bad_rows_carry_file_and_line(tmp_path: Path) -> None:
    lines = [
        b"who,what,at,v",
        b"1,a,2026-03-01,1",
        b",a,2026-03-01,1",
        b"1,a",
        b"1,a,soon,1",
        b"1,\xff,2026-03-01,1",
        b"1,a,2026-03-01,inf",
    ]
    lines += [b'1,"a\nb",2026-03-01,1', b"2,a,2026-03-01,"]
    (tmp_path / "e.csv").write_bytes(b"\n".join(lines))
    columns = 'user_id = "who", item_id = "what", occurred_at = "at", value = "v"'
    rows = list(describe(tmp_path, "e.csv", columns=columns).events())
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [(row.file, row.line) for row in bad] == [("e.csv", line) for line in (3, 4, 5, 6, 7, 8)]
    assert [row.value for row in rows if isinstance(row, Event)] == [1.0, None]
    json.dumps([row.row for row in bad]).encode()


@pytest.mark.parametrize(
    "unclosed",
    [
        '"unclosed,a,2026-03-01,',  # the next quote, far below or nowhere, would close it
        '1,a,2026-03-01,"unclosed',  # as wide as the header, whatever it swallows
    ],
)
@pytest.mark.parametrize("later", ["", '4,"b",2026-03-01,\n', '4,b,2026-03-01,"said ""so"""\n', '"4",b,2026-03-01,\n'])
@pytest.mark.parametrize("after", [10, MAX_RECORD_LINES * 2])
def test_an_unclosed_quote_costs_its_own_line_only(tmp_path: Path, unclosed: str, later: str, after: int) -> None:
    rows = "2,a,2026-03-01,\n3,a,2026-03-01,x\n"
    (tmp_path / "e.csv").write_text(
        "who,what,at,note\n" + rows + unclosed + "\n" + rows * (after // 2) + later + rows + '5,a,2026-03-01,"x'
    )
    found = list(describe(tmp_path, "e.csv").events())
    bad = [row for row in found if isinstance(row, BadRow)]
    assert [(row.file, row.line) for row in bad] == [("e.csv", 4), ("e.csv", after + bool(later) + 7)]
    assert bad[0].row.startswith(unclosed)
    assert all("a quote opens here" in row.reason for row in bad)
    assert len(found) - len(bad) == after + bool(later) + 4


def test_quoted_fields_may_span_lines(tmp_path: Path) -> None:
    text = 'first, line\n\nthe "second"\n' + "and more\n" * (MAX_RECORD_LINES - 10)
    quoted = text.replace('"', '""')
    (tmp_path / "e.csv").write_text("who,what,at\n1,a,2026-03-01\n2,b,2026-03-01\n")
    (tmp_path / "things.csv").write_text(f'id,name,text\n7,Pear,"{quoted}"\n8,Fig,\n')
    describe(tmp_path, "e.csv")
    path = tmp_path / "larder.toml"
    path.write_text(
        path.read_text().replace("items.csv", "things.csv").replace('"name" }', '"name", description = "text" }')
    )
    pear, fig = Tabular(tmp_path).items()
    assert isinstance(pear, Item)
    assert pear.description == text.strip()
    assert fig == Item("8", "Fig", "", (), {})


def test_a_header_with_an_unclosed_quote_is_a_source_error(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text('"who,what,at\n' + "1,a,2026-03-01\n" * 9)
    with pytest.raises(SourceError, match=r"e\.csv: its header is not CSV: a quote opens here"):
        describe(tmp_path, "e.csv")


@pytest.mark.parametrize(("delimiter", "written"), [("|", "|"), (";", ";"), ("\t", "\\t")])
def test_another_delimiter_is_hinted_at_and_can_be_set(tmp_path: Path, delimiter: str, written: str) -> None:
    lines = ("who,what,at,note", "1,a,2026-03-01,", "2,b", '3,c,2026-03-01,"x,y"')
    (tmp_path / "e.csv").write_text("\n".join(lines).replace(",", delimiter))
    with pytest.raises(SourceError, match=r"has no column 'who'.*set delimiter = ") as refused:
        describe(tmp_path, "e.csv")
    assert f'delimiter = "{written}"' in str(refused.value)
    path = tmp_path / "larder.toml"
    path.write_text(path.read_text().replace('files = "e.csv"', f'files = "e.csv"\ndelimiter = "{written}"'))
    first, short, last = Tabular(tmp_path).events()
    assert isinstance(first, Event)
    assert (first.user_id, first.item_id) == ("1", "a")
    assert isinstance(short, BadRow)
    assert isinstance(last, Event)
    path.write_text(path.read_text().replace(f'"{written}"', '"::"'))
    with pytest.raises(SourceError, match=r"delimiter is '::'; it must be one character"):
        Tabular(tmp_path)


def test_broken_json_lines_and_endless_lines_are_bad_rows(tmp_path: Path) -> None:
    fine = '{"who": "1", "what": "a", "at": "2026-03-01"}'
    endless = '{"who": "' + "x" * (MAX_LINE_BYTES * 2)
    (tmp_path / "e.jsonl").write_text("\n".join([fine, "{", "[1]", endless, fine]))
    rows = list(describe(tmp_path, "e.jsonl").events())
    assert [row.line for row in rows if isinstance(row, BadRow)] == [2, 3, 4]
    assert len(rows) == 5
    assert all(len(row.row) <= 500 for row in rows if isinstance(row, BadRow))


def test_an_instant_no_calendar_holds_is_a_bad_row_not_a_crash(tmp_path: Path) -> None:
    at = pa.array([10**18, int(NOON.timestamp() * 1e6)], pa.timestamp("us"))
    pq.write_table(pa.table({"who": ["1", "2"], "what": ["a", "b"], "at": at}), tmp_path / "e.parquet")
    first, second = describe(tmp_path, "e.parquet").events()
    assert isinstance(first, BadRow)
    assert isinstance(second, Event)


def test_unknown_column_is_named_with_near_matches(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("whom,what,at\n")
    with pytest.raises(SourceError, match=r"e\.csv has no column 'who' \(did you mean whom.*it has: whom, what, at"):
        describe(tmp_path, "e.csv")


def test_newer_files_may_have_more_columns(tmp_path: Path) -> None:
    (tmp_path / "e1.csv").write_text("who,what,at\n1,a,2026-03-01\n")
    (tmp_path / "e2.csv").write_text("new,at,who,v,what\n?,2026-03-02,1,3,a\n")
    source = describe(tmp_path, "e*.csv", columns='user_id = "who", item_id = "what", occurred_at = "at", value = "v"')
    assert [event.value for event in good(source)] == [None, 3.0]
    assert len(list(source.events(since=date(2026, 3, 2)))) == 1


def test_items_and_people(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("who,what,at\n1,a,2026-03-01\n")
    (tmp_path / "things.jsonl").write_text(
        '{"id": 7, "name": "Pear", "tags": "ripe; green;", "price": 1.5, "from": "2026-01-02"}\n'
        '{"id": 8, "name": "Fig", "tags": ["dry"], "price": null}\n{"id": 9, "name": ""}\n'
    )
    (tmp_path / "people.csv").write_text("id,country\n1,NL\n2,\n")
    (tmp_path / "larder.toml").write_text(
        '[events]\nfiles = "e.csv"\ncolumns = { user_id = "who", item_id = "what", occurred_at = "at" }\n'
        '[items]\nfiles = "things.jsonl"\nseparator = ";"\nattributes = ["price"]\n'
        'columns = { item_id = "id", title = "name", categories = "tags", available_at = "from" }\n'
        '[people]\nfiles = "people.csv"\ncolumns = { user_id = "id" }\nprofile = ["country"]\n'
    )
    source = Tabular(tmp_path)
    pear, fig, bad = source.items()
    assert pear == Item("7", "Pear", "", ("ripe", "green"), {"price": 1.5}, datetime(2026, 1, 2, tzinfo=UTC))
    assert fig == Item("8", "Fig", "", ("dry",), {})
    assert isinstance(bad, BadRow)
    assert bad.reason == "title is empty"
    assert list(source.people()) == [Person("1", {"country": "NL"}), Person("2", {})]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('files = "e.csv"', 'files = "f.csv"'), r"no file matches files = 'f\.csv'; found e\.csv"),
        (('time = "iso"', 'time = "second"'), "time is 'second'; it must be one of iso, seconds"),
        (("item_id =", "item ="), "unknown field 'item' .did you mean item_id"),
        (("[items]", "[item]"), "unknown section 'item' .did you mean items"),
        (("[events]", "[events"), "is not TOML"),
    ],
)
def test_faults_in_larder_toml_say_what_is_wrong(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    (tmp_path / "e.csv").write_text("who,what,at\n")
    describe(tmp_path, "e.csv")
    path = tmp_path / "larder.toml"
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(SourceError, match=message):
        Tabular(tmp_path)


def test_broken_parquet_is_a_source_error(tmp_path: Path) -> None:
    (tmp_path / "e.parquet").write_bytes(b"PAR1nothing")
    with pytest.raises(SourceError, match=r"e\.parquet is not readable as Parquet"):
        describe(tmp_path, "e.parquet")


def test_the_printed_example_is_valid() -> None:
    assert set(tomllib.loads(EXAMPLE)) == {"events", "items"}


def test_fingerprint_changes_with_a_new_file_only(tmp_path: Path) -> None:
    (tmp_path / "e1.csv").write_text("who,what,at\n1,a,2026-03-01\n")
    before = describe(tmp_path, "e*.csv").fingerprint()
    assert Tabular(tmp_path).fingerprint() == before
    (tmp_path / "e2.csv").write_text("who,what,at\n")
    assert Tabular(tmp_path).fingerprint() != before


def test_s3_prefix_gives_what_the_folder_gives(tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reads of 4 KiB, so that every file takes several ranges.
    monkeypatch.setattr("orchestration.sources.tabular_files.S3_READ_BYTES", 4096)
    rows = 20_000
    at = pa.array([NOON + timedelta(seconds=i) for i in range(rows)])
    ids = [str(i) for i in range(rows)]
    pq.write_table(pa.table({"who": ids, "what": ids, "at": at, "unused": ids}), tmp_path / "e.parquet")
    (tmp_path / "e.csv").write_text("who,what,at\n" + "".join(f"{i},b,2026-03-02\n" for i in range(500)))
    folder = describe(tmp_path, "e.*")
    client, bucket = boto3.client("s3"), urlsplit(s3_bucket).netloc
    for path in tmp_path.iterdir():
        client.upload_file(str(path), bucket, f"raw/{path.name}")
    source = Tabular(f"{s3_bucket}/raw")
    assert list(source.events()) == list(folder.events())
    assert list(source.items()) == list(folder.items())
    assert source.name == "raw"


def test_s3_faults_are_source_errors(s3_bucket: str) -> None:
    with pytest.raises(SourceError, match=r"s3://nowhere/x cannot be read: .*NoSuchBucket"):
        Tabular("s3://nowhere/x")
    with pytest.raises(SourceError, match=f"{s3_bucket}/nothing is empty"):
        Tabular(f"{s3_bucket}/nothing")
    boto3.client("s3").put_object(Bucket=urlsplit(s3_bucket).netloc, Key="bare/e.csv", Body=b"a\n")
    with pytest.raises(SourceError, match=r"found e\.csv, and larder\.toml is missing"):
        Tabular(f"{s3_bucket}/bare/")
