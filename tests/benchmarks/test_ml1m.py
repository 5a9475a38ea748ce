"""The benchmark's arrays say what the file says, and counts on them give the figures that are known."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestration.compute.co_visitation import popularity
from orchestration.compute.evaluate import evaluate, score_popularity
from orchestration.compute.splits import leave_one_out
from schemas.errors import SourceError
from tests.benchmarks import ml1m

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "ml-1m"
HEAD = "item_id,title,genres,released,director,actors,plot\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sequences.txt").write_text("20\t7 5 9\n3\t9 7\n")
    (tmp_path / "items.csv").write_text(
        HEAD
        + '5,"Quiet, The (1999)","Drama, War",1 Jan 1999,Ann Lee,"Bo Ray, Cy Oz",A man waits.\n'
        + "7,Seven (1995),Crime,1 Jan 1995,,,\n9,Nine (2009),Musical,,,,He sings.\n8,Unseen (2000),Drama,,,,\n"
    )
    return tmp_path


def test_everybody_ends_at_one_instant_a_second_apart(folder: Path) -> None:
    events = ml1m.load(folder).interactions
    assert events.user_ids.tolist() == ["20", "3"]
    assert events.item_ids[events.item].tolist() == ["7", "5", "9", "9", "7"]
    assert ((events.occurred_at - events.occurred_at[-1]) // 1_000_000).tolist() == [-2, -1, 0, -1, 0]
    assert datetime.fromtimestamp(int(events.occurred_at[-1]) / 1e6, UTC) == ml1m.END_AT


def test_items_are_written_as_the_product_writes_them(folder: Path) -> None:
    benchmark = ml1m.load(folder)
    assert benchmark.titles == ["The Quiet (1999)", "Seven (1995)", "Nine (2009)"]
    assert benchmark.categories == [["Drama", "War"], ["Crime"], ["Musical"]]
    assert (
        benchmark.texts[0] == "The Quiet (1999). Drama, War. A man waits. Directed by Ann Lee. With Bo Ray and Cy Oz."
    )


def test_what_is_missing_is_named(folder: Path) -> None:
    (folder / "items.csv").write_text(HEAD + "5,Five (1999),Drama,,,,\n")
    with pytest.raises(SourceError, match=r"no row for 2 items .*'7', '9'"):
        ml1m.load(folder)
    (folder / "items.csv").unlink()
    with pytest.raises(SourceError, match=r"items\.csv is missing"):
        ml1m.load(folder)


def test_validation_labels_are_the_last_but_one(folder: Path) -> None:
    (folder / "sequences.txt").write_text("1\t5 7 9 8\n2\t9 5 7\n")
    train = leave_one_out(ml1m.load(folder).interactions).train
    labels = ml1m.validation_labels(train)
    # The second person keeps two events: too few to leave another out.
    assert train.item_ids[labels.target].tolist() == ["9"]
    assert [train.item_ids[history].tolist() for history in labels.histories()] == [["5", "7"]]


@pytest.mark.shared
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/ml-1m")
def test_counts_give_the_figures_that_are_known() -> None:
    events = ml1m.load(REAL).interactions
    assert (len(events.user_ids), len(events.item_ids), len(events)) == (6040, 3416, 999_611)
    split = leave_one_out(events)
    counts = popularity(split.train)
    floors = {"popularity": score_popularity(counts), "co-visitation": ml1m.tuned_co_visitation(split.train)}
    result = evaluate(floors, split, resamples=10)
    assert result.labels == 6040
    assert result.row("popularity").ndcg[10] == pytest.approx(0.018, abs=0.002)
    # The literature's file gave 0.143 to the first counts that were tried on it; a floor at its best is the harder one.
    assert result.row("co-visitation").ndcg[10] == pytest.approx(0.152, abs=0.002)
