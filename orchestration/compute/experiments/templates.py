"""Prompt templates as arms: how well each followed wishes offline, beside what people did with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg

from orchestration.compute.experiments.analysis import Report
from orchestration.compute.prompt_evaluation import DECIDES
from schemas import prompts

KIND = "wish"
FIGURE = DECIDES[KIND]


@dataclass(frozen=True, slots=True)
class TemplateRow:
    """One arm's template. `offline` is the figure that templates are chosen by, None while it was not judged; `online` the
    arm's first metric, `lift` against control with its interval (control has none)."""

    arm: str
    template: str
    offline: float | None
    online: float | None
    lift: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Templates:
    """The templates of an experiment. `agrees` says whether both orders are the same; None while one is not known."""

    metric: str
    rows: tuple[TemplateRow, ...]
    agrees: bool | None

    def words(self) -> str:
        """Both orders as a sentence."""
        if self.agrees is None:
            return f"offline ({FIGURE}) and online cannot be compared yet"
        order = " over ".join(row.template for row in sorted(self.rows, key=lambda row: -(row.online or 0.0)))
        return f"people prefer {order}; offline ({FIGURE}) said {'the same' if self.agrees else 'otherwise'}"


def compare_templates(connection: psycopg.Connection[Any], report: Report) -> Templates | None:
    """The wish templates of the experiment's arms, offline and online; None if its arms name none."""
    experiment = report.experiment
    if not any(arm.wish_template for arm in experiment.arms) or not report.findings:
        return None
    offline = _offline(connection)
    in_use = dict(connection.execute("SELECT kind, version FROM prompt_winners").fetchall())
    usual = in_use.get(KIND, prompts.DEFAULTS[KIND])
    metric = report.findings[0].metric
    first = {one.arm: one for one in report.findings if one.metric == metric}
    rows = []
    for arm in experiment.arms:
        found = first.get(arm.name)
        control = next(iter(first.values()))
        template = arm.wish_template or usual
        online = control.control if found is None else found.treated
        interval = (None, None, None) if found is None else (found.lift, found.low, found.high)
        rows.append(TemplateRow(arm.name, template, offline.get(template), online, *interval))
    return Templates(metric.words, tuple(rows), _agrees(rows, metric.sign))


def _offline(connection: psycopg.Connection[Any]) -> dict[str, float]:
    """The deciding figure of every wish template that was judged under the newest conditions: only those compare."""
    rows = connection.execute(
        "SELECT DISTINCT ON (version) version, (figures ->> %s)::float8 FROM prompt_evaluations WHERE kind = %s AND conditions = "
        "(SELECT conditions FROM prompt_evaluations WHERE kind = %s ORDER BY evaluation_id DESC LIMIT 1) "
        "ORDER BY version, evaluation_id DESC",
        (FIGURE, KIND, KIND),
    ).fetchall()
    return {version: value for version, value in rows if value is not None}


def _agrees(rows: list[TemplateRow], sign: int) -> bool | None:
    known = [(row.offline, row.online) for row in rows if row.offline is not None and row.online is not None]
    if len(known) < max(2, len(rows)):
        return None
    by_offline = sorted(range(len(known)), key=lambda place: -(known[place][0] or 0.0))
    by_online = sorted(range(len(known)), key=lambda place: -sign * (known[place][1] or 0.0))
    return by_offline == by_online
