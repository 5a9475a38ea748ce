"""Scratch folders: gone with the work that made them, with an erasure, or with age; never another's that is in use."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from orchestration.compute.scratch import open_scratch, remove_scratch

TABLE = pa.table({"user_id": ["anna"]})


def test_a_scratch_folder_goes_with_its_work_however_that_ends(tmp_path: Path) -> None:
    def work() -> None:
        with open_scratch(tmp_path.as_uri(), 0) as scratch:
            scratch.write("rows.parquet", TABLE)
            assert scratch.read("rows.parquet").to_table() == TABLE
            raise ValueError("halfway")

    with pytest.raises(ValueError, match="halfway"):
        work()
    assert not list((tmp_path / "scratch").iterdir())


def test_an_erasure_removes_what_was_computed_before_it_and_nothing_later(tmp_path: Path) -> None:
    with open_scratch(tmp_path.as_uri(), 2) as before, open_scratch(tmp_path.as_uri(), 3) as after:
        before.write("rows.parquet", TABLE)
        after.write("rows.parquet", TABLE)
        assert remove_scratch(tmp_path.as_uri(), 3) == 1
        assert not Path(before.path).exists()
        assert after.read("rows.parquet").to_table() == TABLE
    assert remove_scratch((tmp_path / "empty").as_uri(), 3) == 0


def test_what_a_killed_process_left_goes_once_it_is_old(tmp_path: Path) -> None:
    left = tmp_path / "scratch" / "0-20200101T000000-0badcafe"
    left.mkdir(parents=True)
    with open_scratch(tmp_path.as_uri(), 0):
        assert not left.exists()
