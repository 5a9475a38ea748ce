"""Before the month: what the careless arm would do to people, from the truth, and whether its guardrail can be expected to see it.

Nobody is shown anything: a day's visitors are answered as either arm would, and the truth says what each list is worth. What the
guardrail then needs is the product's own always-valid bound (`experiments/sequential.py`) at the standard error that so many
people, coming so often, leave.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from inference.recommend import Recommender
from orchestration.compute.experiments.metrics import METRICS
from orchestration.compute.experiments.sequential import ALPHA, one_sided_width, tune
from orchestration.month.plan import GUARDRAILS, K, Trial
from orchestration.month.serve import Clock, Street, as_if
from orchestration.month.story import Power
from orchestration.month.truth import DayTruth, clicks
from schemas.serving import RecommendationRequest

Array = NDArray[np.float64]
REHEARSED = 120
"""People who are asked about, each once."""
REHEARSAL_STREAM = 103
"""First element of its random stream's key, beside those of serve.py."""


def rehearse(recommender: Recommender, clock: Clock, street: Street, trial: Trial) -> Power:
    """Answer some of the first day's visitors as control and as the trial's arm would, and say what its guardrail can see."""
    plan = street.plan
    clock.at = plan.noon(1)
    who = sorted({one for _, one in street.visitors(1)})
    rng = plan.world.generator(REHEARSAL_STREAM)
    who = sorted(rng.choice(who, min(REHEARSED, len(who)), replace=False).tolist())
    truth = DayTruth.of(street.simulator, who, street.organic.available(plan.midnight(1)), plan.noon(1))
    expected: dict[str, Array] = {}
    variance: dict[str, Array] = {}
    for arm in ("control", trial.arm):
        lists = []
        for one in who:
            shown = as_if(recommender, RecommendationRequest(user_id=one, k=K), trial, arm)
            lists.append(clicks(truth.of_list(one, shown)))
        expected[arm] = np.array([chance.sum() for chance in lists])
        variance[arm] = np.array([(chance * (1 - chance)).sum() for chance in lists])
    return guardrail_power(trial, visits_of(street, trial), expected, variance)


def visits_of(street: Street, trial: Trial) -> Counter[str]:
    """How many lists each person is going to ask for while the experiment runs: they come whatever they are shown."""
    return Counter(who for day in range(trial.first, trial.last + 1) for _, who in street.visitors(day))


def guardrail_power(
    trial: Trial, visits: Counter[str], expected: dict[str, Array], variance: dict[str, Array]
) -> Power:
    """`expected` and `variance (people,)` are of the clicks of one list, by arm, of some of the people."""
    control, arm = float(expected["control"].mean()), float(expected[trial.arm].mean())
    harm = 1 - arm / control
    times = np.array(list(visits.values()), np.float64)
    per_person, squared = float(times.mean()), float((times**2).mean())
    relative = 0.0
    for name, share in (("control", 1 - trial.share), (trial.arm, trial.share)):
        # Of one person: what chance does to each list, and what makes people differ for good, over all their lists.
        spread = per_person * float(variance[name].mean()) + squared * float(expected[name].var(ddof=1))
        relative += spread / (per_person * control) ** 2 / (share * len(times))
    se = math.sqrt(relative)
    metric = METRICS["click_rate"]
    alpha = ALPHA / len(GUARDRAILS)
    width = float(one_sided_width(se, tune(metric.smallest_lift, 2 * alpha), alpha))
    return Power(trial.name, harm, len(times), int(times.sum()), se, float(ndtr((harm - width) / se)))
