"""Pictures of a drift report: what has moved and how far, how picks went, whether probabilities hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date

from matplotlib.axes import Axes

from orchestration.compute.beyond_accuracy import Reliability
from orchestration.compute.drift.judge import ALARM, WAITING, Finding
from orchestration.compute.drift.sketches import FEATURES, Mean

RED, GREY, GREEN, BLUE = "#c0392b", "#9aa5ab", "#0a8f5b", "#2c6fbb"
MOST_BARS = 20


def draw_distances(findings: Sequence[Finding], axes: Axes) -> None:
    """Each comparison's distance over what would have been enough for an alarm; the furthest of each name and test."""
    furthest: dict[str, tuple[float, Finding]] = {}
    for one in findings:
        if one.state != WAITING:
            over = abs(one.distance) / max(one.enough, 1e-12)
            label = f"{one.name if one.kind == FEATURES else f'{one.kind} {one.name}'} ({one.test})"
            if label not in furthest or over > furthest[label][0]:
                furthest[label] = (over, one)
    rows = sorted(furthest.items(), key=lambda entry: entry[1][0])[-MOST_BARS:]
    axes.axvline(1.0, color="#444", linewidth=1, linestyle="--")
    axes.barh(
        [label for label, _ in rows],
        [over for _, (over, _) in rows],
        color=[RED if one.state == ALARM else GREY for _, (_, one) in rows],
    )
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("distance over the least that matters; red is an alarm, grey beyond 1 may be chance", fontsize=8)
    if not rows:
        _nothing(axes, "nothing to compare yet")


def draw_labels(days: Sequence[date], rows: Mapping[str, Sequence[Mean | None]], axes: Axes) -> None:
    """Means by day with their 95 % intervals."""
    some = False
    for (name, means), color in zip(rows.items(), (GREEN, BLUE, RED), strict=False):
        known = [(day, mean) for day, mean in zip(days, means, strict=True) if mean is not None]
        if known:
            some = True
            axes.errorbar(
                [day.isoformat()[5:] for day, _ in known],
                [mean.mean for _, mean in known],
                [1.96 * mean.error for _, mean in known],
                fmt="o-",
                markersize=3,
                linewidth=1,
                capsize=2,
                color=color,
                label=name.replace("_", " "),
            )
    if not some:
        _nothing(axes, "no picks yet")
        return
    axes.legend(fontsize=8, frameon=False)
    axes.tick_params(axis="x", labelrotation=60, labelsize=7)
    axes.set_ylim(bottom=0)


def draw_reliability(curve: Reliability, axes: Axes) -> None:
    """Said against true, a point for each tenth of what was shown."""
    said, true = [row[1] for row in curve.bins], [row[2] for row in curve.bins]
    top = max(*said, *true, 1e-6) * 1.05
    axes.plot([0, top], [0, top], color=GREY, linewidth=1, linestyle="--")
    axes.plot(said, true, "o-", color=BLUE, markersize=4)
    axes.set_xlabel("probability that the ranker says", fontsize=8)
    axes.set_ylabel("share that was picked", fontsize=8)


def _nothing(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, color="#666")
    axes.set_xticks([])
    axes.set_yticks([])
