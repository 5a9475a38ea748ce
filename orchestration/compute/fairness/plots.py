"""Pictures of a fairness report: exposure over relevance by group, picks by segment, diversity by day."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date

import numpy as np
from matplotlib.axes import Axes

from orchestration.compute.beyond_accuracy import BeyondAccuracy
from orchestration.compute.drift.plots import BLUE, GREEN, GREY, RED
from orchestration.compute.fairness.exposure import GroupExposure
from orchestration.compute.fairness.people import SegmentQuality


def draw_exposure(rows: Sequence[GroupExposure], axes: Axes) -> None:
    """The ratio of exposure to relevance of each group with its interval, on a logarithmic axis: 1 is even."""
    known = [(one.group, one.ratio, one.low, one.high) for one in rows if one.ratio is not None]
    _ratios([(name, ratio, low or 0.0, high or 0.0) for name, ratio, low, high in known if ratio], axes)
    axes.set_xlabel("exposure over relevance; between the dotted lines it is within a factor of 2", fontsize=8)


def draw_segments(rows: Sequence[SegmentQuality], axes: Axes) -> None:
    """Each segment's picks per request over those of everybody else."""
    known = [(one.segment, one.ratio, one.low or 0.0, one.high or 0.0) for one in rows if one.ratio]
    _ratios([(name, ratio, low, high) for name, ratio, low, high in known if ratio is not None], axes)
    axes.set_xlabel("picks per request over everybody else's", fontsize=8)


def draw_diversity(rows: Mapping[date, BeyondAccuracy], axes: Axes) -> None:
    """Coverage, evenness of exposure and diversity within a list, by day."""
    days = [day.isoformat()[5:] for day in sorted(rows)]
    found = [rows[day] for day in sorted(rows)]
    series: list[tuple[str, list[float], str]] = [
        ("coverage of the catalogue", [one.coverage_rate for one in found], GREEN),
        ("Gini of exposure", [one.exposure_gini for one in found], RED),
        ("diversity within a list", [one.diversity for one in found if one.diversity is not None], BLUE),
    ]
    for label, values, color in series:
        if len(values) == len(days) > 0:
            axes.plot(days, values, "o-", markersize=3, linewidth=1, color=color, label=label)
    if found:
        axes.legend(fontsize=8, frameon=False)
    axes.set_ylim(0, 1)
    axes.tick_params(axis="x", labelrotation=60, labelsize=7)


def _ratios(rows: Sequence[tuple[str, float, float, float]], axes: Axes) -> None:
    if not rows:
        axes.text(0.5, 0.5, "too little to tell yet", ha="center", va="center", transform=axes.transAxes, color="#666")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    place = np.arange(len(rows))[::-1]
    ratio, low, high = (np.array([row[number] for row in rows]) for number in (1, 2, 3))
    low = np.minimum(np.maximum(low, 1e-2), ratio)
    high = np.maximum(high, ratio)
    uneven = (low > 2) | (high < 0.5)
    for number, color in enumerate([RED if bad else BLUE for bad in uneven]):
        span = [[ratio[number] - low[number]], [high[number] - ratio[number]]]
        axes.errorbar([ratio[number]], [place[number]], xerr=span, fmt="o", markersize=4, capsize=2, color=color)
    axes.axvline(1, color="#444", linewidth=1)
    for border in (0.5, 2):
        axes.axvline(border, color=GREY, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
    axes.minorticks_off()
    axes.set_yticks(place, [row[0] for row in rows])
    axes.tick_params(axis="y", labelsize=7)
