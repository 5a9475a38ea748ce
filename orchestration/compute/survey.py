"""What people answered to the page's two questions, by experiment and arm: means with what chance may have done to them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import psycopg
from scipy import stats

CONFIDENCE = 0.95
NO_EXPERIMENT = "none"


@dataclass(frozen=True, slots=True)
class SurveyRow:
    """Answers of one arm to one question, from 1 to 5; `low` and `high` bound the mean (Student's t), None of one person.

    A person counts once, by the mean of their answers: who answers every week is one opinion.
    """

    experiment: str
    arm: str
    question: str
    people: int
    answers: int
    mean: float
    low: float | None
    high: float | None


_ANSWERS = """
    SELECT {experiment}, {arm}, a.question, a.user_id, avg(a.answer)::float8, count(*)
    FROM survey_answers AS a {served} WHERE a.answered_at >= %(since)s AND a.answered_at < %(until)s
    GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3
"""


def survey_by_arm(connection: psycopg.Connection[Any], since: datetime, until: datetime) -> list[SurveyRow]:
    """One row per experiment, arm and question of the answers in `[since, until)`.

    The arm is that of the list that was asked about, as the served log has it; answers about a list that is not there any
    more, or that was in no experiment, stand under "none".
    """
    (logged,) = connection.execute("SELECT to_regclass('public.served_requests') IS NOT NULL").fetchone() or (False,)
    sql = _ANSWERS.format(
        experiment=f"coalesce(r.experiment, '{NO_EXPERIMENT}')" if logged else f"'{NO_EXPERIMENT}'",
        arm=f"coalesce(r.arm, '{NO_EXPERIMENT}')" if logged else f"'{NO_EXPERIMENT}'",
        # Of the person's own list only: an answer may name any request.
        served="LEFT JOIN served_requests AS r ON r.request_id = a.request_id AND r.user_id = a.user_id"
        if logged
        else "",
    )
    groups: dict[tuple[str, str, str], list[tuple[float, int]]] = {}
    for experiment, arm, question, _, mean, count in connection.execute(sql, {"since": since, "until": until}):
        groups.setdefault((experiment, arm, question), []).append((mean, count))
    return [_row(*group, people) for group, people in groups.items()]


def _row(experiment: str, arm: str, question: str, people: list[tuple[float, int]]) -> SurveyRow:
    means = np.array([mean for mean, _ in people])
    low = high = None
    if len(means) > 1:
        margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(means) - 1) * stats.sem(means))
        low, high = float(means.mean()) - margin, float(means.mean()) + margin
    answers = sum(count for _, count in people)
    return SurveyRow(experiment, arm, question, len(means), answers, float(means.mean()), low, high)
