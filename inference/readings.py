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
    from inference.shadows import Shadows


def watch(models: LoadedModels, served: ServedLog, shadows: Shadows) -> Callable[[], None]:
    """Observe them until what this returns is called."""

    def read() -> Iterator[metrics.Reading]:
        current = models.current()
        for ranker in (*([current] if current else []), *models.beside.loaded()):
            version = metrics.version_label(ranker.version)
            which = {"recsys.model.version": version}
            says = {"recsys.model.provider": ranker.provider, "recsys.precision": ranker.precision}
            yield "recsys.model.loaded", 1, which | says
            trained = datetime.fromisoformat(ranker.manifest.trained_until)
            yield "recsys.model.age", time.time() - trained.timestamp(), which
        yield "recsys.served_log.queue.size", served.waiting, {}
        for outcome, count in (("written", served.written), ("dropped", served.dropped), ("failed", served.failed)):
            yield "recsys.served_log.reads", count, {"recsys.outcome": outcome}
        requests = served.requests
        yield "recsys.served_log.requests.waiting", requests.waiting, {}
        for outcome in ("written", "dropped", "failed"):
            yield "recsys.served_log.requests", getattr(requests, outcome), {"recsys.outcome": outcome}
        for outcome in ("done", "dropped", "failed"):
            yield "recsys.shadows", getattr(shadows, outcome), {"recsys.outcome": outcome}

    return metrics.watch(read)
