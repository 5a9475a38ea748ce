"""What is told once the month is over: fairness, and off-policy estimates, each beside the truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orchestration.compute.fairness.report import WINDOW_DAYS, FairnessReport, fairness_report
from orchestration.compute.off_policy import NoSupport
from orchestration.compute.off_policy_log import judge_most, read_explored
from orchestration.compute.report_files import write_report
from orchestration.month.place import Place
from orchestration.month.plan import Plan
from orchestration.month.serve import Street
from orchestration.month.story import Story
from orchestration.month.truth import clicks

PROFILE = "age_band"


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment of people over the last two weeks: the share of lists with a click as the product reports it, the share that
    the truth expects, and the reported ratio to everybody else's with its interval."""

    name: str
    lists: int
    reported: float
    true: float
    ratio: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class OffPolicy:
    """Clicks per list of the ranking as it stands, from the lists that were drawn at random, against the truth of that very
    ranking for the same requests. `words` where nothing can be said."""

    places: int
    lists: int
    value: float
    low: float
    high: float
    true: float
    words: str = ""


def judge_fairness(place: Place, plan: Plan, street: Street, story: Story) -> tuple[FairnessReport, list[Segment]]:
    """The product's fairness report of the last two weeks; its segments by age beside the truth."""
    report = fairness_report(place.url, place.lake, plan.date(plan.days), profile_columns=[PROFILE])
    write_report(place.folder, "fairness", report.day, report.to_dict(), report.plots())
    late = [one for one in story.visits if one.day > plan.days - WINDOW_DAYS]
    ages = [f"{PROFILE}: {street.organic.profile(one.user_id)[PROFILE]}" for one in late]
    found = []
    for segment in report.segments:
        true = [one.pick for one, age in zip(late, ages, strict=True) if age == segment.segment]
        if true and segment.pick_rate is not None:
            found.append(
                Segment(
                    segment.segment.removeprefix(f"{PROFILE}: "),
                    segment.requests,
                    segment.pick_rate,
                    float(np.mean(true)),
                    segment.ratio,
                    segment.low,
                    segment.high,
                )
            )
    return report, found


def judge_exploration(place: Place, plan: Plan, street: Street) -> OffPolicy:
    """What the explored lists say of the unexplored ranking, and what is true of it."""
    since, until = plan.midnight(max(plan.explores_from, plan.days - WINDOW_DAYS + 1)), plan.midnight(plan.days + 1)
    with place.connect() as connection:
        logged, requests, pools = read_explored(connection, place.lake, since, until)
        try:
            found, _ = judge_most(logged, logged.scores)
        except NoSupport as error:
            return OffPolicy(0, len(requests), 0.0, 0.0, 0.0, 0.0, str(error))
        asked = {
            request_id: (who, at)
            for request_id, who, at in connection.execute(
                "SELECT request_id, user_id, served_at FROM served_requests WHERE request_id = ANY(%s)", (requests,)
            )
        }
    worth = []
    for row, (request_id, pool) in enumerate(zip(requests, pools, strict=True)):
        who, at = asked[request_id]
        order = np.argsort(-logged.scores[row, : len(pool)], kind="stable")[: found.places]
        noon = at.replace(hour=12, minute=0, second=0, microsecond=0)
        relevance = street.simulator.relevance([who] * len(order), [pool[n] for n in order.tolist()], noon)
        worth.append(float(clicks(relevance.astype(np.float64)).sum()))
    dr = found.dr
    return OffPolicy(found.places, found.lists, dr.value, dr.low, dr.high, float(np.mean(worth)))
