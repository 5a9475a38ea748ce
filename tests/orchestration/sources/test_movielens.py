"""MovieLens in both layouts: hand-made rows, and the real set where it is at hand."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from orchestration.sources import BadRow
from orchestration.sources.movielens import MovieLens100K, MovieLensCsv, open_movielens, plain_title
from schemas.errors import SourceError
from schemas.events import Event, Item, Person

REAL = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "ml-100k"
FLAGS = "|".join("0" for _ in range(18))
real = [pytest.mark.shared, pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/ml-100k")]


@pytest.fixture
def classic(tmp_path: Path) -> Path:
    (tmp_path / "u.data").write_text("1\t10\t4\t900000000\n2\t11\t5\t900090000\n")
    (tmp_path / "u.item").write_bytes(
        f"10|Lantern, The (1991)|01-Jan-1991||url|0|1|{FLAGS[2:]}\n11|unknown||||1|{FLAGS}\n".encode("latin-1")
        + f"12|Épée, L' (1950)||||0|{FLAGS}\n".encode("latin-1")
    )
    (tmp_path / "u.user").write_text("1|33|F|baker|12345\n2|old|M|smith|99999\n")
    (tmp_path / "movie_details.json").write_text(
        '[{"movie_id": 10, "description": "A lamp goes out.", "director": ["Ann Vole"], "year": "1991",'
        ' "cast": ["A B", "C D", "E F", "G H", "I J"]}, {"movie_id": 12, "description": "Another film.", "year": 2019.0}]'
    )
    return tmp_path


@pytest.fixture
def current(tmp_path: Path) -> Path:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,10,4.5,900000000\n")
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n10,"Lantern, The (1991)",Drama|War\n11,Kite (2001),(no genres listed)\n',
        encoding="utf-8",
    )
    return tmp_path


def test_a_rating_becomes_an_event_with_a_repeatable_id(classic: Path) -> None:
    first = next(MovieLens100K(classic).events())
    assert first == Event("ml-1-10-900000000", "1", "10", "rating", 4.0, datetime(1998, 7, 9, 16, 0, tzinfo=UTC))


def test_item_has_plain_title_genres_and_a_description_in_sentences(classic: Path) -> None:
    item = next(MovieLens100K(classic).items())
    assert isinstance(item, Item)
    assert (item.title, item.categories) == ("The Lantern (1991)", ("Action",))
    assert item.description == "A lamp goes out. Directed by Ann Vole. With A B, C D, E F and G H."


def test_unknown_title_and_details_of_another_film(classic: Path) -> None:
    _, unknown, remade = MovieLens100K(classic).items()
    assert isinstance(unknown, Item)
    assert isinstance(remade, Item)
    assert (unknown.title, unknown.categories) == ("Untitled film 11", ())
    assert (remade.title, remade.description) == ("L'Épée (1950)", "")


def test_people_and_their_bad_rows(classic: Path) -> None:
    good, bad = MovieLens100K(classic).people()
    assert good == Person("1", {"age": 33, "gender": "F", "occupation": "baker"})
    assert bad == BadRow("u.user", 2, "age 'old' is not a whole number", "2|old|M|smith|99999")


def test_broken_lines_are_bad_rows_in_place(classic: Path) -> None:
    lines = ["1\t10\t4", "1\t10\tnine\t900000000", "\t10\t4\t900000000", "1\t10\t4\t-5", "1\t10\t4\t" + "9" * 600]
    with (classic / "u.data").open("a") as file:
        file.write("\n".join(lines) + "\n")
    rows = list(MovieLens100K(classic).events())
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [row.line for row in bad] == [3, 4, 5, 6, 7]
    assert len(bad[-1].row) == 500
    assert MovieLens100K(classic).event_count() == len(rows) == 7


def test_range_since_and_fingerprint(classic: Path) -> None:
    source = MovieLens100K(classic)
    assert [moment.day for moment in source.time_range()] == [9, 10]
    assert len(list(source.events(since=date(1998, 7, 10)))) == 1
    before = source.fingerprint()
    with (classic / "u.data").open("a") as file:
        file.write("3\t10\t1\t900000001\n")
    assert source.fingerprint() != before


@pytest.mark.parametrize(
    ("title", "plain"),
    [
        ("Lantern, The (1991)", "The Lantern (1991)"),
        ("Kite, The (Drachen, Der) (1930)", "The Kite (Der Drachen) (1930)"),
        ("Paris, Ohio (1984)", "Paris, Ohio (1984)"),
        ("Boats, Les", "Les Boats"),
    ],
)
def test_plain_title(title: str, plain: str) -> None:
    assert plain_title(title) == plain


def test_missing_file_and_wrong_columns_are_source_errors(classic: Path) -> None:
    (classic / "u.data").write_text("1,10,4,900000000\n")
    with pytest.raises(SourceError, match=r"u\.data: expected 4 columns .* found 1 in '1,10"):
        open_movielens(classic)
    (classic / "u.user").unlink()
    with pytest.raises(SourceError, match=r"u\.user is missing; found .*u\.item.*; expected u\.data"):
        open_movielens(classic)


def test_details_that_are_no_json_are_a_source_error(classic: Path) -> None:
    (classic / "movie_details.json").write_text("[{]")
    with pytest.raises(SourceError, match="movie_details"):
        list(MovieLens100K(classic).items())


def test_current_layout(current: Path) -> None:
    (current / "tags.csv").write_text("userId,movieId,tag,timestamp\n1,10,rain,1\n2,10,Slow,1\n3,10,slow,1\n")
    source = MovieLensCsv(current)
    lantern, kite = source.items()
    assert lantern == Item("10", "The Lantern (1991)", "Tagged slow, rain.", ("Drama", "War"), {"year": 1991})
    assert isinstance(kite, Item)
    assert kite.categories == ()
    (event,) = source.events()
    assert isinstance(event, Event)
    assert (event.value, event.event_id, source.event_count()) == (4.5, "ml-1-10-900000000", 1)


def test_current_layout_names_a_missing_column(current: Path) -> None:
    (current / "ratings.csv").write_text("user,movieId,rating,timestamp\n")
    with pytest.raises(SourceError, match=r"ratings\.csv: column userId is missing; found user, .*; expected userId"):
        open_movielens(current)


class TestRealSet:
    pytestmark = real

    def test_everything_is_read_without_a_bad_row(self) -> None:
        source = MovieLens100K(REAL)
        events = list(source.events())
        assert len({event.event_id for event in events if isinstance(event, Event)}) == 100_000 == source.event_count()
        assert sum(isinstance(person, Person) for person in source.people()) == 943
        items = [item for item in source.items() if isinstance(item, Item)]
        assert len(items) == 1682
        assert all(item.title.strip() for item in items)
        assert sum(item.title.startswith("Untitled") for item in items) == 1
        assert sum(bool(item.description) for item in items) > 1500
