"""The benchmark of scoring everybody runs, says what it promises, and its arrays are scored without a database."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import score_all


def test_a_quick_run_and_its_arrays_without_a_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = score_all.main(["--quick", "--people", "60", "--export", str(tmp_path / "out")])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["score_all_users_per_s"] == report["score_all_users_per_s"] > 0
    assert told["candidates"] == 200
    assert {"rank_ms_per_user", "candidates_ms_per_user", "read_people_ms_per_user", "write_ms_per_user"} <= set(told)
    core = score_all.main(["--core-only", "--inputs", str(tmp_path / "out"), "--repeats", "1"])
    assert (core["people"], core["items"]) == (60, 400)
    assert core["score_all_core_users_per_s"] > 0


def test_arrays_without_a_folder_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        score_all.main(["--core-only"])
    assert "--core-only needs --inputs" in capsys.readouterr().err
