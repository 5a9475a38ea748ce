"""Which source a value of DATA means, and what the refusals say."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from orchestration.sources import Source
from orchestration.sources.movielens import MovieLens100K, MovieLensCsv
from orchestration.sources.open import open_source
from orchestration.sources.simulator import Simulator
from orchestration.sources.tabular import Tabular
from schemas.errors import SourceError


def opened(data: object) -> Source:
    return open_source(
        None if data is None else str(data), start=date(2026, 1, 5), until=datetime(2026, 2, 1, tzinfo=UTC)
    )


def test_nothing_is_the_simulator() -> None:
    source = opened(None)
    assert isinstance(source, Simulator)
    assert source.world.start == date(2026, 1, 5)


def test_layouts_are_told_apart_and_larder_toml_decides(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,3,900000000\n")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n2,Kite,Drama\n")
    assert isinstance(opened(tmp_path), MovieLensCsv)
    (tmp_path / "larder.toml").write_text(
        '[events]\nfiles = "ratings.csv"\ntime = "seconds"\n'
        'columns = { user_id = "userId", item_id = "movieId", occurred_at = "timestamp" }\n'
        '[items]\nfiles = "movies.csv"\ncolumns = { item_id = "movieId", title = "title" }\n'
    )
    assert isinstance(opened(tmp_path), Tabular)
    for name, text in (("u.data", "1\t2\t3\t4\n"), ("u.item", "1|x||||" + "|".join("0" * 19)), ("u.user", "1|2|F|x|y")):
        (tmp_path / name).write_text(text)
    (tmp_path / "larder.toml").unlink()
    assert isinstance(opened(tmp_path), MovieLens100K)


def test_missing_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere does not exist; set DATA"):
        opened(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="is empty"):
        opened(tmp_path)


def test_unknown_layout_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    layouts = (
        r"found notes\.txt(.|\n)*u\.data, u\.item, u\.user(.|\n)*ratings\.csv, movies\.csv(.|\n)*tables: larder\.toml"
    )
    with pytest.raises(SourceError, match=f"unknown layout: {layouts}"):
        opened(tmp_path)
    (tmp_path / "notes.txt").rename(tmp_path / "notes.csv")
    with pytest.raises(SourceError, match=f"unknown layout: {layouts}".replace("txt", "csv")):
        opened(tmp_path)


def test_benchmark_sequences_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "sequences.txt").write_text("1\t2 3\n")
    with pytest.raises(SourceError, match="no timestamps"):
        opened(tmp_path)


def test_tables_without_larder_toml_get_an_example(tmp_path: Path) -> None:
    (tmp_path / "orders.csv").write_text("a,b\n")
    with pytest.raises(SourceError, match=r"found orders\.csv, and larder\.toml is missing(.|\n)*\[events\]"):
        opened(tmp_path)


def test_a_simulated_world_takes_its_parameters_from_data() -> None:
    source = opened("simulated?people=300&items=150&events_per_person=20.5&seed=3")
    assert isinstance(source, Simulator)
    assert (source.world.people, source.world.items, source.world.events_per_person, source.world.seed) == (
        300,
        150,
        20.5,
        3,
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("simulated?peple=3", "has no 'peple'; it has seed, people"),
        ("simulated?people=x", "people is 'x'; give a number"),
    ],
)
def test_a_simulated_world_refuses_what_it_does_not_know(data: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        opened(data)
