"""Features of training labels and their slates, as they were known at each label's time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from inference.assemble import crossed
from orchestration.compute.evaluate import SlateFeatures
from orchestration.compute.interactions import Interactions
from orchestration.compute.point_in_time import PointInTime
from schemas.views import CANDIDATE_VIEWS, CONTEXT_VIEWS, CROSS_VIEWS, candidate_features


class Slates:
    """Makes slate features by point-in-time joins: a `MakeSlates` for training and for evaluation.

    `interactions` is the table that label rows refer to; `categories` lists each catalogue item's categories. Context
    that a training set holds already (`known`: ascending label rows, values, mask) is not asked for again.
    """

    def __init__(
        self,
        point_in_time: PointInTime,
        interactions: Interactions,
        categories: list[list[str]],
        known: tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]] | None = None,
    ) -> None:
        self._ask = point_in_time
        self._known = known
        self._events = interactions
        self._names = np.array(sorted({name for names in categories for name in names}), np.str_)
        place = {name: index for index, name in enumerate(self._names.tolist())}
        self._membership = np.zeros((len(categories), len(self._names)), np.float32)
        for item, names in enumerate(categories):
            self._membership[item, [place[name] for name in names]] = 1.0

    def context(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Context values and mask `(l, f)` for label rows `(l,)`."""
        if self._known is not None and np.isin(rows, self._known[0]).all():
            place = np.searchsorted(self._known[0], rows)
            return self._known[1][place], self._known[2][place]
        users = self._events.user_ids[self._events.user[rows]]
        at = self._events.occurred_at[rows]
        parts = [self._ask.features(view, {"user_id": users}, at) for view in CONTEXT_VIEWS]
        return np.concatenate([part.values for part in parts], 1), np.concatenate([part.mask for part in parts], 1)

    def trends(self, instants: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What was known of every item at `instants (t,)` (microseconds, UTC): values and mask `(t, items, g)`.

        Features of the person and the candidate together are left out: their mask is 0.
        """
        items = len(self._events.item_ids)
        crossed_features = sum(len(view.features) for view in CROSS_VIEWS)
        keys = {"item_id": np.tile(self._events.item_ids, len(instants))}
        found = [self._ask.features(view, keys, np.repeat(instants, items)) for view in CANDIDATE_VIEWS]
        none = np.zeros((len(instants), items, crossed_features), np.float32)
        values = [part.values.reshape(len(instants), items, -1) for part in found]
        masks = [part.mask.reshape(len(instants), items, -1) for part in found]
        return np.concatenate([*values, none], 2), np.concatenate([*masks, none], 2)

    def __call__(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
        """Features for label rows `(l,)` and candidate items `(l, n)`; n may be 0."""
        labels, n = candidates.shape
        at = self._events.occurred_at[rows]
        context, context_mask = self.context(rows)
        if n == 0:  # only the person is asked about
            none = np.zeros((labels, 0, len(candidate_features())), np.float32)
            return SlateFeatures(context, context_mask, none, none)
        instants, instant = np.unique(at, return_inverse=True)
        # An item at an instant reads the same whoever asks: one question for each such pair.
        pair = instant[:, None].astype(np.int64) * len(self._events.item_ids) + candidates
        pairs, answer = np.unique(pair, return_inverse=True)
        asked_items = self._events.item_ids[pairs % len(self._events.item_ids)]
        asked_at = instants[pairs // len(self._events.item_ids)]
        values, masks = [], []
        for view in CANDIDATE_VIEWS:
            found = self._ask.features(view, {"item_id": asked_items}, asked_at)
            values.append(found.values[answer].reshape(labels, n, -1))
            masks.append(found.mask[answer].reshape(labels, n, -1))
        c = len(self._names)
        users = np.repeat(self._events.user_ids[self._events.user[rows]], c)
        for view in CROSS_VIEWS:
            keys = {"user_id": users, "category": np.tile(self._names, labels)}
            affinity = self._ask.features(view, keys, np.repeat(at, c))
            f = affinity.values.shape[1]
            by_label, by_label_mask = affinity.values.reshape(labels, c, f), affinity.mask.reshape(labels, c, f)
            value, mask = np.zeros((labels, n, f), np.float32), np.zeros((labels, n, f), np.float32)
            for label in range(labels):
                value[label], mask[label] = crossed(
                    by_label[label], by_label_mask[label], self._membership[candidates[label]]
                )
            values.append(value)
            masks.append(mask)
        return SlateFeatures(context, context_mask, np.concatenate(values, 2), np.concatenate(masks, 2))
