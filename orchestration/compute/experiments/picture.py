"""The plot of an experiment: each metric's lift with its interval over the days, the split, the segments."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from orchestration.compute.experiments.analysis import Report, Series
from orchestration.compute.experiments.split import MISMATCH_P

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0a6", "#06a", "#a60", "#a06", "#666")
_METRICS = 3
"""So many metrics are drawn at most, in the order they are declared."""
_SEGMENTS = 14


def picture(report: Report, dpi: int = 110) -> bytes:
    """The whole plot as a PNG."""
    from matplotlib.figure import Figure  # drawing is rare, importing it is slow

    names = list(dict.fromkeys(line.metric.name for line in report.series))[:_METRICS]
    figure = Figure(figsize=(9.6, 2.6 * max(1, len(names)) + 3.2), layout="constrained")
    figure.suptitle(f"{report.experiment.name}: {report.decision.verdict}", fontsize=11)
    grid = figure.add_gridspec(len(names) + 1, 2, height_ratios=[*[1.0] * len(names), 1.25])
    for row, name in enumerate(names):
        axes = figure.add_subplot(grid[row, :])
        _plain(axes, next(line.metric.words for line in report.series if line.metric.name == name))
        draw_effect(axes, report, name)
    left, right = figure.add_subplot(grid[-1, 0]), figure.add_subplot(grid[-1, 1])
    _plain(left, "share of people in each arm, declared share dotted")
    draw_split(left, report)
    _plain(right, "by segment, to look at only")
    draw_segments(right, report)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def draw_effect(axes: Axes, report: Report, metric: str | None = None) -> None:
    """The lift of one metric (default: the first) with its interval at the end of each day, an arm a colour."""
    lines = [line for line in report.series if line.metric.name == (metric or report.series[0].metric.name)]
    days = np.arange(1, len(report.days) + 1)
    for line, colour in zip(lines, _COLOURS, strict=False):
        axes.fill_between(days, 100 * line.low, 100 * line.high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(days, 100 * line.lift, color=colour, marker=".", markersize=4, label=line.arm)
    axes.axhline(0, color="#333", linewidth=0.8)
    _limit(axes, lines)
    axes.set_xlabel("day", fontsize=8)
    axes.set_ylabel("lift, %", fontsize=8)
    axes.legend(fontsize=8, frameon=False)


def draw_split(axes: Axes, report: Report) -> None:
    """The share of people in each arm by the end of each day, beside the declared one."""
    total = np.maximum(report.arrivals.sum(axis=1, keepdims=True), 1)
    days = np.arange(1, len(report.days) + 1)
    for place, (arm, colour) in enumerate(zip(report.experiment.arms, ("#888", *_COLOURS), strict=False)):
        axes.plot(days, 100 * report.arrivals[:, place] / total[:, 0], color=colour, label=arm.name)
        axes.axhline(100 * arm.share, color=colour, linestyle=":", linewidth=0.9)
    axes.set_xlabel(f"day (mismatch below p = {MISMATCH_P}; now {report.split.sequential_p:.2g})", fontsize=8)
    axes.set_ylabel("% of people", fontsize=8)
    axes.legend(fontsize=8, frameon=False)


def draw_segments(axes: Axes, report: Report) -> None:
    """The first metric's lift in each segment of the first arm that has one."""
    rows = [row for row in report.segments if row.lift is not None]
    rows = [row for row in rows if (row.metric, row.arm) == (rows[0].metric, rows[0].arm)][:_SEGMENTS]
    for place, row in enumerate(rows):
        assert row.low is not None
        assert row.high is not None
        axes.plot([100 * row.low, 100 * row.high], [place, place], color="#888", linewidth=1.5)
        axes.plot([100 * (row.lift or 0.0)], [place], color=_COLOURS[0], marker="o", markersize=4)
    axes.set_yticks(range(len(rows)), [f"{row.name} ({row.people:,})" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="#333", linewidth=0.8)
    axes.set_xlabel(f"lift, % ({rows[0].metric.words}, {rows[0].arm})" if rows else "too few people", fontsize=8)


def _limit(axes: Axes, lines: list[Series]) -> None:
    """The first days' wide intervals must not flatten the others: what is drawn is three times the last one's width."""
    ends = [(line.low[-1], line.high[-1]) for line in lines if np.isfinite(line.low[-1])]
    if ends:
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
        axes.set_ylim(100 * (low - (high - low)), 100 * (high + (high - low)))


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
