"""`make bench-ranker`: how good, how small and how fast the ranker is, and with PEERS=1 RecTools' SASRec beside it.

On MovieLens where it lies in ../shared/data, else on a simulated world, and then it says so. Every section runs in a process
of its own and prints its tables:

    ml1m       MovieLens-1M, leave-one-out: trained, judged against the floors; the same checkpoint in int8
    cold       the same with a tenth of the items hidden from training: those found by their text, the others as before
    ml100k     MovieLens-100K through the product's own road, global time split; with and without time
    people     the checkpoint of ml1m asked by people of whom only a wish is known, or their first few events
    speed      500 and 1,000 candidates scored in int8, small and standard; scores that do not depend on the company
    encoding   item texts and wishes encoded, beside sentence-transformers
    rectools   with --peers: RecTools' SASRec, in its own virtual environment, on ml1m's split with its time to train

Ends with one JSON object, and writes it with everything else under tests/benchmarks/results/. With `--work FOLDER` what is
finished is kept there, checkpoints included, and a repeat goes on from it.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import frame
from tests.benchmarks.frame import note, say

SECTIONS = ("ml1m", "cold", "ml100k", "people", "speed", "encoding")
KEYS = (
    "ml1m_ndcg_at_10",
    "ml1m_hr_at_10",
    "ml1m_train_seconds",
    "ml1m_co_visitation_ndcg_at_10",
    "ml1m_gain_ci_low",
    "ml100k_time_split_ndcg_at_10",
    "ml100k_time_split_popularity_7d_ndcg_at_10",
    "ml100k_time_split_co_visitation_ndcg_at_10",
    "cold_item_recall_ratio",
    "prompt_genre_lift",
    "int8_ndcg_loss_rate",
    "int8_top10_overlap",
    "int8_size_bytes",
    "batch_invariance_max_shift",
    "score_500_small_p50_ms",
    "score_500_standard_p50_ms",
    "encode_items_speedup",
    "encode_wish_speedup",
    "encode_wish_cosine",
)
"""What the last line holds; with --peers also what rectools gives, prefixed with `rectools_`. On a simulated world `data`
says so, whatever the names of the keys."""


def main(arguments: Sequence[str] | None = None) -> int:
    options, chosen = frame.options(__doc__, SECTIONS, "RecTools", arguments)
    with tempfile.TemporaryDirectory(prefix="larder-bench-") as scratch:
        work = (options.work or Path(scratch) / "work").resolve()
        work.mkdir(parents=True, exist_ok=True)
        report: dict[str, Any] = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "quick": options.quick,
            "data": "simulated" if simulated(options.quick) else "MovieLens",
            "machine": frame.machine(),
            "sections": {},
        }
        say("machine", report["machine"])
        if report["data"] == "simulated":
            print("data: a simulated world, not MovieLens; figures named ml1m and ml100k are of that world\n")
        numbers: dict[str, float] = {}
        for name in (*chosen, *(("rectools",) if options.peers else ())):
            found = frame.kept(work, name, partial(_section, name, work, Path(scratch), options.quick))
            numbers |= found["numbers"]
            report["sections"][name] = found
            for text in found["tables"]:
                print(f"{text}\n", flush=True)
            say(name, found["numbers"])
    frame.write(options.out, "ranker", report)
    frame.table(numbers, KEYS, "RecTools", "rectools_")
    last = {key: round(value, 10) for key, value in numbers.items() if key in KEYS or key.startswith("rectools_")}
    last = {key: last[key] for key in (*KEYS, *last) if key in last}
    print(json.dumps({**({"data": "simulated"} if report["data"] == "simulated" else {}), **last}))
    return 0


def simulated(quick: bool) -> bool:
    """Whether the world is simulated, as sections will see it."""
    from tests.benchmarks.ranker_world import sizes_for

    return sizes_for(quick).simulated


def _section(name: str, work: Path, scratch: Path, quick: bool) -> dict[str, Any]:
    began = time.monotonic()
    found = frame.apart(name, run, name, work, scratch, quick)
    note(f"{name} took {time.monotonic() - began:.0f} s")
    return found


def run(name: str, work: Path, scratch: Path, quick: bool) -> dict[str, Any]:
    """A section, in this process: its numbers, its tables as text and details for the dated file."""
    import warnings

    warnings.filterwarnings("ignore")  # third parties' notices belong into no table
    from tests.benchmarks.ranker_world import sizes_for

    sections = importlib.import_module("tests.benchmarks.ranker_sections")
    found: dict[str, Any] = getattr(sections, name)(sections.Where(work, scratch), sizes_for(quick), note)
    return found


if __name__ == "__main__":
    sys.exit(main())
