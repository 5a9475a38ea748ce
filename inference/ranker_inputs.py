"""What was read for a request as the ranker's inputs; see schemas/ranker.py for names and shapes."""

from __future__ import annotations

from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from inference.assemble import crossed, finish, graph_values, history_gaps
from inference.candidates import Candidates
from inference.live import Columns
from inference.store import PersonRow
from schemas.events import KINDS
from schemas.features import FeatureView
from schemas.views import CANDIDATE_VIEWS, CONTEXT_VIEWS, CROSS_VIEWS


def person_inputs(
    person: PersonRow, at: datetime, wish: NDArray[np.float32] | None, dim: int
) -> dict[str, NDArray[np.generic]]:
    """The inputs that describe the person and the request: one person, so b is 1."""
    seconds = at.timestamp()
    parts = [_one_row(view, person.views[view.name], seconds) for view in CONTEXT_VIEWS]
    history = person.history
    # An item that has left the catalogue says nothing. Its event is left out, not masked: the newest must stand last.
    kept = [row for row, vector in enumerate(history.vectors) if vector is not None and len(vector) == dim]
    h = max(len(kept), 1)
    vectors = np.zeros((1, h, dim), np.float32)
    kinds = np.zeros((1, h), np.int64)
    values, gaps, mask = (np.zeros((1, h), np.float32) for _ in range(3))
    if kept:
        vectors[0] = [history.vectors[row] for row in kept]
        kinds[0] = [KINDS.index(history.kinds[row]) + 1 for row in kept]
        values[0] = graph_values(np.array([history.values[row] for row in kept], np.float32))  # None is NaN here
        gaps[0] = history_gaps(history.occurred_at[kept], seconds)
        mask[0] = 1.0
    return {
        "context_features": np.concatenate([values_ for values_, _ in parts], 1),
        "context_mask": np.concatenate([mask_ for _, mask_ in parts], 1),
        "prompt_vector": np.zeros((1, dim), np.float32) if wish is None else wish,
        "prompt_mask": np.array([0.0 if wish is None else 1.0], np.float32),
        "history_vectors": vectors,
        "history_kinds": kinds,
        "history_values": values,
        "history_gaps": gaps,
        "history_mask": mask,
    }


def candidate_inputs(candidates: Candidates, views: dict[str, Columns], at: datetime) -> dict[str, NDArray[np.generic]]:
    """The inputs that describe n candidates."""
    n = len(candidates)
    seconds = np.full(n, at.timestamp())
    values, masks = [], []
    for view in CANDIDATE_VIEWS:
        columns = candidates.features
        present = np.isfinite(columns.as_of) & columns.settled
        value, mask = finish(view, columns.states, at=seconds, as_of=np.nan_to_num(columns.as_of), present=present)
        values.append(value)
        masks.append(mask)
    for view in CROSS_VIEWS:
        value, mask = _crossed(view, views[view.name], candidates, at.timestamp())
        values.append(value)
        masks.append(mask)
    return {
        "candidate_vectors": candidates.vectors[None],
        "candidate_features": np.concatenate(values, 1)[None],
        "candidate_mask": np.concatenate(masks, 1)[None],
    }


def _one_row(view: FeatureView, columns: Columns, seconds: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if not columns.keys or not columns.settled:
        empty = np.zeros((1, len(view.features)), np.float32)
        return empty, empty
    states = {name: values[:1] for name, values in columns.states.items()}
    return finish(view, states, at=np.array([seconds]), as_of=columns.as_of[:1], present=np.ones(1, bool))


def _crossed(
    view: FeatureView, columns: Columns, candidates: Candidates, seconds: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    n = len(candidates)
    if not columns.keys or not columns.settled:
        empty = np.zeros((n, len(view.features)), np.float32)
        return empty, empty
    place = {key[-1]: index for index, key in enumerate(columns.keys)}
    value, mask = finish(
        view, columns.states, at=np.full(len(place), seconds), as_of=columns.as_of, present=np.ones(len(place), bool)
    )
    # One column more, which is left out, for the categories that the person has nothing of.
    membership = np.zeros((n, len(place) + 1), np.float32)
    known = candidates.category_numbers
    if known is not None:
        where = np.full(len(known.numbers) + 1, len(place))
        for name, index in place.items():
            if name in known.numbers:
                where[known.numbers[name]] = index
        membership[np.arange(n)[:, None], where[known.rows]] = 1.0
    else:
        at = [place.get(name, -1) for names in candidates.categories for name in names]
        membership[np.repeat(np.arange(n), [len(names) for names in candidates.categories]), at] = 1.0
    return crossed(value, mask, membership[:, :-1])
