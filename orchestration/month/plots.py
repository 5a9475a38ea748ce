"""Pictures of the month: quality, experiments, drift and fairness, truth beside estimates; large enough to read on a phone."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from orchestration.compute.drift.plots import BLUE, GREEN, GREY, RED
from orchestration.compute.drift.sketches import CALIBRATION, FEATURES, LABELS, SCORES
from orchestration.compute.drift.vectors import VECTORS
from orchestration.month.judge import Segment
from orchestration.month.plan import K, Plan
from orchestration.month.story import Story

FONT = 11


def draw_quality(plan: Plan, story: Story, axes: Axes) -> None:
    """True relevance of what was shown, of the popular and of the best list, by day."""
    days = [day.number for day in story.days]
    axes.plot(days, [day.best for day in story.days], color=GREY, ls="--", label="best possible")
    axes.plot(days, [day.relevance for day in story.days], color=GREEN, lw=2, label="shown")
    axes.plot(days, [day.popular for day in story.days], color=BLUE, label="what is trending")
    _mark(plan, story, axes)
    axes.tick_params(labelsize=FONT - 1)
    axes.set_xlabel("day", fontsize=FONT)
    axes.set_ylabel("mean true relevance of a list", fontsize=FONT)
    axes.set_ylim(bottom=min(0.0, *(day.popular for day in story.days)))
    axes.legend(fontsize=FONT - 1, loc="lower left", ncols=3)


def draw_clicks(plan: Plan, story: Story, axes: Axes) -> None:
    """Click rate as seen and as true, and what the popular and the best lists would get."""
    days = [day.number for day in story.days]
    axes.plot(
        days,
        [day.best_clicks / (K * max(day.visits, 1)) for day in story.days],
        color=GREY,
        ls="--",
        label="best possible",
    )
    axes.plot(days, [day.true_click_rate for day in story.days], color=GREEN, lw=2, label="shown, true")
    axes.plot(days, [day.click_rate for day in story.days], "o", color=GREEN, ms=3.5, label="shown, as clicked")
    axes.plot(
        days,
        [day.popular_clicks / (K * max(day.visits, 1)) for day in story.days],
        color=BLUE,
        label="what is trending",
    )
    _mark(plan, story, axes)
    axes.tick_params(labelsize=FONT - 1)
    axes.set_xlabel("day", fontsize=FONT)
    axes.set_ylabel("clicks per shown item", fontsize=FONT)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(fontsize=FONT - 1, loc="lower left", ncols=4)


def draw_experiments(plan: Plan, story: Story, axes: Axes) -> None:
    """Each experiment's estimated lift with its interval at every day's end, and the true lift."""
    for trial, color in zip(plan.trials, (BLUE, RED), strict=True):
        told = [
            (one.day, one.lift, one.lift - one.low, one.high - one.lift)
            for one in story.estimates.get(trial.name, [])
            if one.lift is not None and one.low is not None and one.high is not None
        ]
        if told:
            day, lifts, below, above = zip(*told, strict=True)
            axes.errorbar(
                day,
                lifts,
                yerr=[below, above],
                fmt="o",
                ms=4,
                color=color,
                capsize=3,
                label=f"{trial.name}: estimate and interval",
            )
        (control, _), (arm, _) = story.true_rates(trial.name, "control"), story.true_rates(trial.name, trial.arm)
        if control:
            lift = arm / control - 1
            axes.plot(
                [trial.first - 0.5, trial.last + 0.5],
                [lift, lift],
                color=color,
                ls="--",
                label=f"{trial.name}: true lift",
            )
    axes.axhline(0, color=GREY, lw=0.8)
    axes.tick_params(labelsize=FONT - 1)
    axes.set_xlim(plan.trials[0].first - 1, plan.trials[-1].last + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("day", fontsize=FONT)
    axes.set_ylabel("lift in clicks per shown item", fontsize=FONT)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(fontsize=FONT - 1)


KINDS = {FEATURES: GREY, SCORES: "#b58900", VECTORS: BLUE, LABELS: GREEN, CALIBRATION: RED}


def draw_drift(plan: Plan, story: Story, axes: Axes) -> None:
    """How far each kind of drift reaches by day: 1 is an alarm's distance, 2 a severe one's. A dot is an alarm, a large one severe."""
    told = [(day.number, day.drift) for day in story.days if day.drift is not None]
    for kind, color in KINDS.items():
        line = [(number, drift.reach[kind]) for number, drift in told if kind in drift.reach]
        if line:
            axes.plot(*zip(*line, strict=True), color=color, lw=1.2, label=kind)
        for number, drift in told:
            if any(alarm.startswith(kind) for alarm in drift.alarms):
                severe = any(alarm.startswith(kind) for alarm in drift.severe)
                axes.plot([number], [drift.reach[kind]], "o", color=color, ms=9 if severe else 5)
    for value in (1, 2):
        axes.axhline(value, color=GREY, lw=0.8, ls=":")
    axes.set_xlim(0.5, plan.days + 0.5)
    axes.set_ylim(bottom=0)
    _mark(plan, story, axes)
    axes.tick_params(labelsize=FONT - 1)
    axes.set_xlabel("day (dot: an alarm, large: a severe one)", fontsize=FONT)
    axes.set_ylabel("distance, in alarms", fontsize=FONT)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=FONT - 1, loc="upper left")


def draw_fairness(segments: list[Segment], axes: Axes) -> None:
    """Lists with a click by age: reported, and true."""
    places = list(range(len(segments)))
    axes.barh([n - 0.2 for n in places], [one.reported for one in segments], height=0.38, color=GREEN, label="reported")
    axes.barh([n + 0.2 for n in places], [one.true for one in segments], height=0.38, color=GREY, label="true")
    axes.set_yticks(places, [f"{one.name} ({one.lists:,} lists)" for one in segments], fontsize=FONT)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=FONT - 1)
    axes.set_xlabel("lists with a click, last two weeks", fontsize=FONT)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(fontsize=FONT - 1)


def _mark(plan: Plan, story: Story, axes: Axes) -> None:
    """The days that matter, at the top of the picture."""
    marks = [(plan.drift_day - 0.5, "taste moves", GREY)]
    marks += [
        (model.day + 0.5, "new model" if model.passed else "refused", GREEN) for model in story.models if model.day
    ]
    if any("rolled back" in line for day in story.days for line in day.happened):
        marks.append((plan.rollback_day - 0.5, "rolled back", RED))
    for line, (at, words, color) in enumerate(sorted(marks)):  # each in a line of its own: they may be a day apart
        axes.axvline(at, color=color, lw=0.9)
        where = axes.get_xaxis_transform()
        axes.text(at, 1.01 + 0.05 * line, words, fontsize=FONT - 1, color=color, ha="center", transform=where)
