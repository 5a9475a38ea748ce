"""What an application says of itself whenever metrics are collected: the model in memory, the queues behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from inference import metrics

if TYPE_CHECKING:
    from inference.models import LoadedModels
    from inference.served import ServedLog


def watch(models: LoadedModels, served: ServedLog) -> Callable[[], None]:
    """Observe both until what this returns is called."""

    def read() -> Iterator[metrics.Reading]:
        ranker = models.current()
        if ranker is not None:
            version = metrics.version_label(ranker.version)
            which = {"recsys.model.version": version}
            says = {"recsys.model.provider": ranker.provider, "recsys.precision": ranker.precision}
            yield "recsys.model.loaded", 1, which | says
            trained = datetime.fromisoformat(ranker.manifest.trained_until)
            yield "recsys.model.age", time.time() - trained.timestamp(), which
        yield "recsys.served_log.queue.size", served.waiting, {}
        for outcome, count in (("written", served.written), ("dropped", served.dropped), ("failed", served.failed)):
            yield "recsys.served_log.reads", count, {"recsys.outcome": outcome}

    return metrics.watch(read)
