"""Two short questions about a list: who is asked, and where the answers go."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime

from inference.sql_files import statement
from inference.store import Store
from schemas.serving_people import QUESTIONS, SurveyOutcome, SurveyQuestions, SurveyRequest


def asks(user_id: str, at: datetime, per_mille: int) -> bool:
    """Whether `user_id` is among the `per_mille` of 1,000 people who are asked in the week (ISO, UTC) of `at`.

    The same all week whatever process answers; another share of people the next week.
    """
    if not per_mille:
        return False
    year, week, _ = at.astimezone(UTC).isocalendar()
    digest = hashlib.blake2b(
        f"{year}-{week}\0{user_id}".encode("utf-8", "surrogatepass"), digest_size=8, person=b"survey"
    ).digest()
    return int.from_bytes(digest) % 1_000 < per_mille


def questions(store: Store, user_id: str, at: datetime, per_mille: int, timeout_ms: float) -> SurveyQuestions:
    """What to ask `user_id` now: nothing of whom the draw leaves out, nor of who answered this week."""
    if not asks(user_id, at, per_mille):
        return SurveyQuestions()
    ((answered,),) = store.rows(statement("survey_answered"), {"user_id": user_id, "at": at}, timeout_ms)
    return SurveyQuestions() if answered else SurveyQuestions(questions=QUESTIONS)


def accept(writer: Store, request: SurveyRequest, timeout_ms: float) -> SurveyOutcome:
    """Keep the answers, each once per list and question: answering again replaces it. Nothing is kept of who is forgotten."""
    rows = [
        {"user_id": request.user_id, "request_id": request.request_id, "question": one.question, "answer": one.answer}
        for one in request.answers
    ]
    ((stored,),) = writer.call("accept_survey", [json.dumps(rows)], timeout_ms)
    return SurveyOutcome(stored=stored)
