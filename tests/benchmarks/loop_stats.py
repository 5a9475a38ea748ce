"""Whether the statistics of experiments and off-policy estimates keep what they promise, on simulated runs of known truth.

    python -m tests.benchmarks.loop_stats [--quick]
    python -m tests.benchmarks.loop_stats --picture docs/experiment-analysis.png

    aa_reject_rate   of experiments without any effect: how many are ever called better or worse, looking after every person
                     (people come once) or every day (the same people return); the worse of the two
    lift_power       of experiments with a lift of 5 %, as many people as the planner says: how many find it
    srm_caught       of 100,000 people dealt out by 51 to 49: how many splits are called broken at a planned end, by either test
                     (_while_running: by the one that may look after every 1,000 people; _exact: 51,000 to 49,000, by both)
    snips_coverage, dr_coverage   of logs of explored lists: how many intervals of 95 % hold the candidate's true value

The simulated world is tests/experiment_worlds.py. Judged are the seeds (1, 0), (1, 1), …; the world's constants and the
estimators' settings were chosen on seeds (900, …), and the planner's variance is measured on (901, 0).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.experiments.analysis import analyse
from orchestration.compute.experiments.declared import Arm, Experiment
from orchestration.compute.experiments.metrics import metrics
from orchestration.compute.experiments.picture import picture
from orchestration.compute.experiments.planner import plan
from orchestration.compute.experiments.ratios import Lift
from orchestration.compute.experiments.sequential import POWER, half_width, tune
from orchestration.compute.experiments.split import MISMATCH_P, judge_split
from orchestration.compute.off_policy import NoSupport, evaluate
from tests.benchmarks.frame import machine, note
from tests.experiment_worlds import (
    explored_lists,
    one_visit_each,
    pilot_variance,
    ranking_world,
    returning_people,
    simulated_panel,
)

JUDGED = 1
RUNS, QUICK_RUNS = 1_000, 40
LIFT = 0.05
AA_PEOPLE, AA_RETURNING, AA_DAYS = 4_000, 2_000, 28
LOOKS = 100
LOG_PEOPLE = 2_000


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_RUNS} runs instead of {RUNS:,}")
    parser.add_argument("--picture", type=Path, help="only draw the documentation's plot, of a simulated experiment")
    options = parser.parse_args(arguments)
    report = draw(options.picture) if options.picture else measure(options.quick)
    print(json.dumps(report))
    return report


def draw(file: Path) -> dict[str, Any]:
    """The plot and the words of two simulated weeks with a lift of 8 %."""
    start = datetime(2026, 2, 2, tzinfo=UTC)
    arms = (Arm("control", 0.5), Arm("new", 0.5))
    judged = ("click_rate", "clicks_per_person")
    experiment = Experiment("ranker-2", start, None, arms, (), metrics(judged), metrics(("hide_rate",)))
    panel = simulated_panel(np.random.default_rng((902, 0)), 12_000, 14, lift=0.08)
    report = analyse(experiment, panel, start + timedelta(days=14))
    file.write_bytes(picture(report, dpi=80))
    return {"picture": str(file), "bytes": file.stat().st_size, "words": report.decision.words}


def measure(quick: bool) -> dict[str, Any]:
    """Every figure, with what it rests on."""
    runs = QUICK_RUNS if quick else RUNS
    report: dict[str, Any] = {"runs": runs}
    for part in (false_alarms, power, mismatches, coverage):
        note(f"{part.__name__.replace('_', ' ')}: {runs:,} runs …")
        report |= part(runs)
    return report | {"quick": quick, "seeds": [JUDGED, runs], "machine": machine()}


def false_alarms(runs: int) -> dict[str, Any]:
    """Experiments without an effect."""
    after_each = _rate(runs, lambda rng: finds(one_visit_each(rng, AA_PEOPLE)))
    daily = _rate(runs, lambda rng: finds(returning_people(rng, AA_RETURNING, AA_DAYS)))
    naive = _rate(runs, lambda rng: finds_without_care(one_visit_each(rng, AA_PEOPLE)))
    return {
        "aa_reject_rate": max(after_each, daily),
        "aa_reject_rate_each_person": after_each,
        "aa_reject_rate_each_day": daily,
        "aa_reject_rate_of_usual_intervals": naive,
    }


def power(runs: int) -> dict[str, Any]:
    """Experiments with a lift, of the size that the planner asks for."""
    planned = plan(LIFT, pilot_variance(np.random.default_rng((901, 0))))
    found = _rate(runs, lambda rng: finds(one_visit_each(rng, planned.people, LIFT, LOOKS)))
    return {"lift_power": found, "lift": LIFT, "stated_power": POWER, "planned_people": planned.people}


def mismatches(runs: int) -> dict[str, Any]:
    """Splits that are off by one in a hundred, and splits that are not."""
    exact = judge_split([[51_000, 49_000]], (0.5, 0.5))
    return {
        "srm_caught": _rate(runs, lambda rng: any(_mismatch(rng, 0.51))),
        "srm_caught_while_running": _rate(runs, lambda rng: _mismatch(rng, 0.51)[0]),
        "srm_caught_exact": exact.sequential_p < MISMATCH_P and exact.chi_square_p < MISMATCH_P,
        "srm_false_alarms": _rate(runs, lambda rng: any(_mismatch(rng, 0.5))),
        "srm_false_alarms_while_running": _rate(runs, lambda rng: _mismatch(rng, 0.5)[0]),
    }


def coverage(runs: int) -> dict[str, Any]:
    """Logs of explored lists, and a candidate that was never shown."""
    truth = ranking_world().truth
    held: dict[str, list[bool]] = {"ips": [], "snips": [], "dr": []}
    widths: dict[str, list[float]] = {"ips": [], "snips": [], "dr": []}
    refused = 0
    for run in range(runs):
        logged, scores = explored_lists(np.random.default_rng((JUDGED, run)), LOG_PEOPLE)
        try:
            found = evaluate(logged, scores)
        except NoSupport:
            refused += 1
            continue
        for name in held:
            estimate = getattr(found, name)
            held[name].append(estimate.low <= truth <= estimate.high)
            widths[name].append(estimate.high - estimate.low)
    return {
        **{f"{name}_coverage": round(float(np.mean(values)), 4) for name, values in held.items()},
        **{f"{name}_width": round(float(np.mean(values)), 4) for name, values in widths.items()},
        "off_policy_truth": round(truth, 4),
        "off_policy_refused": refused,
    }


def finds(lift: Lift) -> bool:
    """Whether an interval that may be looked at any time ever leaves out zero."""
    ready = lift.ready
    width = half_width(np.where(ready, lift.se, 1.0), tune(LIFT))
    return bool((np.abs(lift.lift) > width)[ready].any())


def finds_without_care(lift: Lift) -> bool:
    """The same of the usual interval of 95 %, which holds for one look."""
    ready = lift.ready
    return bool((np.abs(lift.lift[ready]) > 1.96 * lift.se[ready]).any())


def _mismatch(rng: np.random.Generator, share: float) -> tuple[bool, bool]:
    """Whether a split is called broken: by the test that looks a hundred times, and by the one that looks at the end."""
    counts = rng.binomial(1_000, share, 100).cumsum()
    looks: NDArray[np.int64] = np.stack([counts, 1_000 * np.arange(1, 101) - counts], axis=1)
    found = judge_split(looks, (0.5, 0.5))
    return found.sequential_p < MISMATCH_P, found.chi_square_p < MISMATCH_P


def _rate(runs: int, one: Callable[[np.random.Generator], bool]) -> float:
    return sum(one(np.random.default_rng((JUDGED, run))) for run in range(runs)) / runs


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
