"""The month told on one page: Markdown with plots, the same as JSON. Every estimate stands beside the truth."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from orchestration.compute.fairness.report import FairnessReport
from orchestration.compute.report_files import Draw, write_report
from orchestration.month import plots
from orchestration.month.judge import OffPolicy, Segment
from orchestration.month.plan import K, Plan, Trial
from orchestration.month.story import Story

NAME = "month"
MARKDOWN = "report.md"


def write(
    folder: Path,
    out: Path | None,
    plan: Plan,
    story: Story,
    fairness: FairnessReport,
    segments: list[Segment],
    explored: OffPolicy,
    seconds: float,
) -> Path:
    """Write the report below `folder`/reports/month/, its newest also there as latest.json, and a copy into `out`.

    Gives the folder of this report.
    """
    drawn: Mapping[str, Draw] = {
        "quality": partial(plots.draw_quality, plan, story),
        "clicks": partial(plots.draw_clicks, plan, story),
        "experiments": partial(plots.draw_experiments, plan, story),
        "drift": partial(plots.draw_drift, plan, story),
        "fairness": partial(plots.draw_fairness, segments),
    }
    document = to_dict(plan, story, fairness, segments, explored, seconds)
    place = write_report(folder, NAME, plan.date(plan.days), document, drawn)
    (place / MARKDOWN).write_text(markdown(plan, story, fairness, segments, explored, seconds), encoding="utf-8")
    shutil.copyfile(place / MARKDOWN, folder / "reports" / NAME / MARKDOWN)
    if out is not None:
        shutil.copytree(place, out, dirs_exist_ok=True)
    return place


def to_dict(
    plan: Plan,
    story: Story,
    fairness: FairnessReport,
    segments: list[Segment],
    explored: OffPolicy,
    seconds: float,
) -> dict[str, Any]:
    """Plain JSON values; names nobody."""
    return {
        "first": plan.first.isoformat(),
        "days": [asdict(day) | {"date": day.date.isoformat()} for day in story.days],
        "plan": {
            name: getattr(plan, name)
            for name in (
                "seed",
                "people",
                "items",
                "most_lists",
                "epochs",
                "drift_day",
                "drift_strength",
                "rollback_day",
            )
        },
        "models": [asdict(model) for model in story.models],
        "experiments": {
            trial.name: {
                "estimates": [asdict(one) for one in story.estimates.get(trial.name, [])],
                "power": asdict(story.power[trial.name]) if trial.name in story.power else None,
                "true_lift": _true_lift(story, trial, 0),
                "true_lift_of_hides": _true_lift(story, trial, 1),
            }
            for trial in plan.trials
        },
        "drift": {
            "began": plan.drift_day,
            "alarm": story.alarm_since(plan.drift_day, severe=False),
            "severe_alarm": story.alarm_since(plan.drift_day, severe=True),
            "alarms_before": story.alarms_before(plan.drift_day),
        },
        "fairness": {
            "segments": [asdict(one) for one in segments],
            "uneven": fairness.uneven,
            "left_behind": fairness.left_behind,
        },
        "off_policy": asdict(explored),
        "seconds": round(seconds, 1),
    }


def markdown(
    plan: Plan,
    story: Story,
    fairness: FairnessReport,
    segments: list[Segment],
    explored: OffPolicy,
    seconds: float,
) -> str:
    """The page."""
    return (
        "\n\n".join(
            [
                "# A simulated month",
                f"{sum(day.visits for day in story.days):,} lists in {plan.days} days from {plan.first} (seed {plan.seed}), simulated in "
                f"{seconds / 60:.1f} minutes. Everything that decides is the product's own; people and their taste are simulated, so "
                "what is true is known and stands beside each estimate.",
                _headlines(plan, story, explored),
                "![Relevance by day](quality.png)\n![Clicks by day](clicks.png)",
                "## Experiments",
                _experiments(plan, story),
                "![Lift by day, estimated and true](experiments.png)",
                "## Drift, retraining, roll-back",
                _drift(plan, story),
                "![Drift by day](drift.png)",
                "## Fairness",
                _fairness(fairness, segments),
                "![Lists with a click, reported and true](fairness.png)",
                "## Day by day",
                _by_day(story),
            ]
        )
        + "\n"
    )


def _headlines(plan: Plan, story: Story, explored: OffPolicy) -> str:
    shown = sum(day.shown for day in story.days)
    places = K * sum(day.visits for day in story.days)
    clicked, true = sum(day.clicked for day in story.days), sum(day.clicks for day in story.days)
    rows = [
        ["clicks per shown item", f"{clicked / shown:.4f}", f"{true / shown:.4f}"],
        ["… of what is trending", "", f"{sum(day.popular_clicks for day in story.days) / places:.4f}"],
        ["… of the best possible lists", "", f"{sum(day.best_clicks for day in story.days) / places:.4f}"],
    ]
    for trial in plan.trials:
        told = story.estimates.get(trial.name, [])
        last = next((one for one in reversed(told) if one.lift is not None), None)
        estimate = f"{last.lift:+.1%} ({last.low:+.1%} to {last.high:+.1%})" if last else "too early to say"
        rows.append(
            [f"lift of {trial.arm} in experiment {trial.name}", estimate, _percent(_true_lift(story, trial, 0))]
        )
    for severe, words in ((False, "an alarm"), (True, "a severe alarm")):
        found = story.alarm_since(plan.drift_day, severe=severe)
        told_on = f"end of day {found[0]}" if found else "none"
        rows.append([f"{words} of something new after taste moved", told_on, f"moves on day {plan.drift_day}"])
    if explored.words:
        rows.append(
            ["clicks per list of the unexplored ranking, from explored lists", f"cannot be told: {explored.words}", ""]
        )
    else:
        rows.append(
            [
                f"clicks on the first {explored.places} places of the unexplored ranking, from {explored.lists:,} explored lists",
                f"{explored.value:.3f} ({explored.low:.3f} to {explored.high:.3f})",
                f"{explored.true:.3f}",
            ]
        )
    worst = max(story.days, key=lambda day: day.p99_ms)
    middle = sorted(day.p50_ms for day in story.days)[len(story.days) // 2]
    rows.append(
        ["latency of a list in this process", f"median {middle:.0f} ms, worst day's p99 {worst.p99_ms:.0f} ms", ""]
    )
    rows.append(["lists with a rung missing", f"{sum(day.degraded for day in story.days):,}", ""])
    return _table(["", "as the product sees it", "truth"], rows)


def _experiments(plan: Plan, story: Story) -> str:
    parts = []
    for trial in plan.trials:
        told = story.estimates.get(trial.name, [])
        verdict = told[-1] if told else None
        stopped = next((one for one in told if one.done), None)
        lines = [f"**{trial.name}** (days {trial.first}–{trial.last}, {trial.share:.0%} of people): {trial.words}."]
        if verdict is None:
            lines.append("It had no report.")
        else:
            final = stopped or verdict
            lines.append(f"The product's verdict on day {final.day}: **{final.verdict}**. {final.words}.")
        if stopped:
            lines.append(f"Done by itself at the end of day {stopped.day}: {'; '.join(stopped.done)}.")
        if (power := story.power.get(trial.name)) is not None:
            lines.append(
                f"Reckoned before the month from the truth: its arm would lose {power.harm:.1%} of the clicks, and by the last day "
                f"{power.people:,} people with {power.lists:,} lists would let the guardrail see that with a probability of "
                f"{power.power:.0%} at least."
            )
        lines.append(
            f"True lift, had everybody been in {trial.arm}: clicks {_percent(_true_lift(story, trial, 0))}, hides "
            f"{_percent(_true_lift(story, trial, 1))}."
        )
        inside = [one for one in told if one.low is not None and one.high is not None]
        true = _true_lift(story, trial, 0)
        if inside and true is not None:
            held = sum(one.low <= true <= one.high for one in inside)  # type: ignore[operator]
            lines.append(f"The interval held the true lift on {held} of the {len(inside)} days that had one.")
        parts.append(" ".join(lines))
    return "\n\n".join(parts)


def _drift(plan: Plan, story: Story) -> str:
    lines = [f"Everybody's taste began to move on day {plan.drift_day}, within three days."]
    if before := story.alarms_before(plan.drift_day):
        listed = ", ".join(f"{name} (day {day})" for name, day in before.items())
        lines.append(
            f"Until then alarms were raised of {listed}. Nobody's taste had moved by then: those are of what else was new, such "
            "as people who click in lists, or the arms of an experiment."
        )
    else:
        lines.append("Until then the drift report raised no alarm.")
    for severe, words in ((False, "an alarm"), (True, "a severe alarm")):
        if found := story.alarm_since(plan.drift_day, severe=severe):
            lines.append(
                f"The first day with {words} of something that had raised none before: {found[0]}, "
                f"{_days_after(found[0] - plan.drift_day)} ({', '.join(found[1])})."
            )
        else:
            lines.append(
                f"There was no {words.removeprefix('an ').removeprefix('a ')} of anything that had raised none before."
            )
    for model in story.models:
        when = f"after day {model.day}" if model.day else "before day 1"
        lines.append(
            f"Model {model.version[:8]}, trained {when} in {model.seconds:.0f} s: {'released' if model.passed else 'not released'} "
            f"({'; '.join(model.words)})."
        )
    retrained = next(
        (model for model in story.models if model.day and model.passed and model.day >= plan.drift_day), None
    )
    earlier = _quality(story, 1, plan.drift_day - 1)
    if retrained is not None:
        lines.append(
            f"True relevance shown, as a share of the way from trending to the best possible: {earlier} before the drift, "
            f"{_quality(story, plan.drift_day, retrained.day)} from then on with the old model, "
            f"{_quality(story, retrained.day + 1, plan.days)} from the new model's first day on."
        )
    else:
        lines.append(
            f"True relevance shown, as a share of the way from trending to the best possible: {earlier} before the drift, "
            f"{_quality(story, plan.drift_day, plan.days)} from then on."
        )
    lines += [
        line[0].upper() + line[1:] + "."
        for day in story.days
        for line in day.happened
        if "roll" in line or "forward" in line
    ]
    return "\n".join(f"- {line}" for line in lines)


def _days_after(days: int) -> str:
    return "the day it began" if days == 0 else f"{days} day{'s' if days > 1 else ''} after it began"


def _quality(story: Story, first: int, last: int) -> str:
    """How far what was shown on those days lies from what is trending (0 %) towards the best possible (100 %)."""
    days = [day for day in story.days if first <= day.number <= last]
    gap = sum(day.best - day.popular for day in days)
    return f"{sum(day.relevance - day.popular for day in days) / gap:.0%}" if gap else "–"


def _fairness(fairness: FairnessReport, segments: list[Segment]) -> str:
    lines = [f"- {line}" for line in (*fairness.left_behind, *fairness.uneven)] or [
        "No group of items is shown more than twice, or less than half, of what its relevance earns, and no segment of people is "
        "left behind, as far as two weeks can tell."
    ]
    rows = [
        [
            one.name,
            f"{one.lists:,}",
            f"{one.reported:.3f}",
            f"{one.true:.3f}",
            f"{one.ratio:.2f} ({one.low:.2f}–{one.high:.2f})" if one.ratio is not None else "",
        ]
        for one in segments
    ]
    return "\n".join(lines) + "\n\n" + _table(["age", "lists", "with a click", "true", "over everybody else"], rows)


def _by_day(story: Story) -> str:
    rows = [
        [
            str(day.number),
            str(day.visits),
            f"{day.click_rate:.3f}",
            f"{day.true_click_rate:.3f}",
            f"{day.relevance:.2f}",
            f"{day.popular:.2f}",
            f"{day.best:.2f}",
            f"{day.p50_ms:.0f} / {day.p99_ms:.0f}",
            ", ".join(f"{version[:8]} {count}" for version, count in day.models.items()),
            "; ".join(day.happened),
        ]
        for day in story.days
    ]
    header = [
        "day",
        "lists",
        "click rate",
        "true",
        "relevance",
        "trending's",
        "best",
        "p50 / p99 ms",
        "answered by",
        "what happened",
    ]
    return _table(header, rows)


def _true_lift(story: Story, trial: Trial, what: int) -> float | None:
    control, arm = story.true_rates(trial.name, "control")[what], story.true_rates(trial.name, trial.arm)[what]
    return arm / control - 1 if control else None


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1%}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in line) + " |" for line in lines
    )
