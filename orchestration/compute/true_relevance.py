"""What only a simulated world can tell: how much people truly like what a list shows them, whatever they went on to pick."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.co_visitation import DAY_MICROSECONDS
from orchestration.compute.splits import Queries
from orchestration.sources.simulator import Simulator


def true_relevance(
    simulator: Simulator, requests: Queries, lists: NDArray[np.int32], *, k: int = 10
) -> NDArray[np.float64]:
    """`(r,)`: mean true utility, to the one who asks, of the first k of `lists (r, n)` (−1 is no item; NaN for none).

    Taken at noon of the request's day (UTC): the season moves by days. The people and items of `requests` are the
    simulator's own. Raises SourceError for an id that its world does not have.
    """
    lists = lists[:, :k]
    events = requests.interactions
    started = int(simulator.world.started_at.timestamp() * 1e6)
    day = (requests.at - started) // DAY_MICROSECONDS
    total, shown = np.zeros(len(lists)), (lists >= 0).sum(axis=1)
    for number in np.unique(day).tolist():
        row, place = np.nonzero((lists >= 0) & (day == number)[:, None])
        utility = simulator.relevance(
            events.user_ids[requests.user[row]].tolist(),
            events.item_ids[lists[row, place]].tolist(),
            simulator.world.started_at + timedelta(days=number + 0.5),
        )
        np.add.at(total, row, utility)
    mean: NDArray[np.float64] = np.divide(total, shown, out=np.full(len(lists), np.nan), where=shown > 0)
    return mean
