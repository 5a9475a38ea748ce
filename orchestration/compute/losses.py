"""The losses of an epoch of each stage, batch by batch: what the training loop steps through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from inference.assemble import graph_values
from orchestration.compute.batches import HistoryWindows, batches
from orchestration.compute.co_visitation import positive
from orchestration.compute.devices import Devices
from orchestration.compute.evaluate import SlateFeatures, history_inputs
from orchestration.compute.interactions import Interactions
from orchestration.compute.mining import NEVER, SLATE
from orchestration.compute.model import FIRST_EVENT, PROMPT, ItemTower, Ranker
from orchestration.compute.objective import Trends, item_softmax
from orchestration.compute.splits import Queries
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.wishes import Wishes
from schemas.ranker import MAX_HISTORY


class Losses:
    """What both stages minimise, for the modules as they are when a batch's turn comes."""

    def __init__(
        self,
        interactions: Interactions,
        counts: NDArray[np.float32],
        wishes: Wishes | None,
        ranker: Ranker,
        tower: ItemTower,
        trends: Trends,
        calibration: Tensor,
        config: TrainConfig,
        devices: Devices,
        held: NDArray[np.int64],
    ) -> None:
        """`counts (items,) float32` is the items' popularity; `calibration (2,)` scale and offset of slate scores.

        The events `held (h,)` are no labels of stage 1.
        """
        self.interactions = interactions
        self.learned = positive(interactions.kind)
        self.learned[held] = False
        self.seconds_at = interactions.occurred_at / 1e6
        self.counts = counts
        self.wishes = wishes
        self.ranker = ranker
        self.tower = tower
        self.trends = trends
        self.calibration = calibration
        self.config = config
        self.devices = devices
        self.device = calibration.device
        self.batch_tokens = config.batch_tokens or int(np.clip(len(interactions) // 64, 1024, 8192))
        self.windows = HistoryWindows(interactions, self.batch_tokens, config.seed)

    def window_batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """This process's batches of windows, see `HistoryWindows.epoch`."""
        return self.devices.share(self.windows.epoch(epoch))

    def next_item(self, epoch: int) -> Iterator[Tensor]:
        """One loss per batch: next-item softmax at every position, with and without ids in the item vectors."""
        generator = self._generator(2, epoch)
        events = self.interactions
        for windows in self.window_batches(epoch):
            begin, stop, starts = windows[:, :1], windows[:, 1:2], windows[:, 2:]
            h = max(1, int((stop - begin).max()) - 1)
            row = stop - 1 - h + np.arange(h)  # (b, h) the last event is only a target
            real = row >= begin
            row = np.where(real, row, 0)
            target_row = np.where(real, row + 1, 0)
            gaps = np.where(real, self.seconds_at[target_row] - self.seconds_at[row], 0)
            # Column 0 is the prompt's position: it predicts the first event of a person.
            first = np.where(begin[:, 0] < stop[:, 0], begin[:, 0], 0)
            target_row = np.concatenate([first[:, None], target_row], axis=1)  # (b, 1 + h)
            counted = np.concatenate([starts > 0, real], axis=1) & self.learned[target_row]
            prompt, prompt_mask = self._window_wishes(target_row, counted, generator)
            vectors, text_only = self.tower()
            tokens = self.ranker.prefix(
                *self._no_context(len(windows)),
                prompt,
                prompt_mask,
                functional.embedding(self._tensor(events.item[row]), vectors)
                * self._tensor(real, vectors.dtype).unsqueeze(-1),
                self._tensor(np.where(real, events.kind[row], 0)),
                self._tensor(np.where(real, graph_values(events.value[row]), 0), torch.float32),
                self._tensor(gaps, torch.float32),
            )
            with self._autocast():
                states, _ = self.ranker.encode(tokens, None, self.ranker.biases(self._tensor(real, torch.float32)))
            # Padding never reaches the loss, so its states are dropped before the widest product.
            place, rows = self.windows.predictions(windows, target_row, counted)
            users = self.ranker.user_vectors(states[:, PROMPT:].flatten(0, 1)[self._tensor(place)])  # (m, d)
            yield self._item_losses(users, rows, vectors, text_only, generator)

    def _item_losses(
        self,
        users: Tensor,
        rows: NDArray[np.int64],
        vectors: Tensor,
        text_only: Tensor,
        generator: np.random.Generator,
    ) -> Tensor:
        """Softmax of `users (m, d)` for label rows `(m,)` over items, plus its twin in which half the items are new.

        Those have their text alone, in company of items that have more: a new item is to be as likely as it is, and is
        no rival to others where all are known by text alone.
        """
        target = self._tensor(self.interactions.item[rows]).long()
        when = self._tensor(self.trends.when(self.interactions.occurred_at[rows]))
        trend = self.trends.present(self.trends.gains(self.ranker.trend.weight))
        with self._autocast():
            loss = item_softmax(users, target, vectors, trend, when, self.config, self.counts, generator)
            if self.config.text_only_weight:
                part = self._tensor(generator.random(len(users)) < self.config.text_only_rate)
                new = self._tensor(generator.random((len(vectors), 1)) < 0.5)
                mixed = torch.where(new, text_only, vectors)
                loss = loss + self.config.text_only_weight * item_softmax(
                    users[part], target[part], mixed, trend, when[part], self.config, self.counts, generator
                )
        return loss

    def _window_wishes(
        self, target_row: NDArray[np.int64], counted: NDArray[np.bool_], generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Give some windows a wish and let only what fits it count as a label; `counted (b, 1 + h)` changes in place."""
        b = len(target_row)
        if self.wishes is None:
            return torch.zeros(b, self.ranker.user.out_features, device=self.device), torch.zeros(b, device=self.device)
        chosen = np.argmax(generator.random(counted.shape) * counted, axis=1)  # a random counted position
        item = self.interactions.item[target_row[np.arange(b), chosen]]
        texts, meant = self.wishes.draw(item, generator)
        given = meant.any(1) & counted.any(1) & (generator.random(b) < self.config.prompt_rate)
        fits = (self.wishes.item_categories[self.interactions.item[target_row]] & meant[:, None, :]).any(-1)
        counted &= fits | ~given[:, None]
        mask = self._tensor(given, torch.float32)
        return self.tower.project_text(self._tensor(texts)) * mask.unsqueeze(1), mask

    def slate_batches(self, labels: Queries, epoch: int) -> list[NDArray[np.int64]]:
        """This process's batches of indices into `labels`, at most `slate_rows` an epoch, of similar history length."""
        generator = np.random.default_rng((self.config.seed, 4, epoch))
        chosen = generator.permutation(len(labels))[: self.config.slate_rows]
        length = np.minimum(labels.stop - labels.start, MAX_HISTORY)[chosen]
        order = np.argsort(length * generator.uniform(0.9, 1.1, len(length)), kind="stable")
        tokens = length[order] + FIRST_EVENT + SLATE
        cut = batches(chosen[order][:, None], tokens, 2 * self.batch_tokens, generator)
        return self.devices.share([batch[:, 0] for batch in cut])

    def slates(
        self,
        labels: Queries,
        candidates: NDArray[np.int32],
        log_q: NDArray[np.float32],
        wished: NDArray[np.float32],
        features: SlateFeatures,
        epoch: int,
    ) -> Iterator[Tensor]:
        """One loss per batch: softmax through u over all items, softmax and calibrated BCE over the slate.

        `candidates` and `log_q`, both `(labels, 64)`, are as `mine` gives them, by the wishes `wished (labels, 384)`.
        """
        generator = self._generator(5, epoch)
        for batch in self.slate_batches(labels, epoch):
            part, slate = labels.take(batch), candidates[batch]
            keep_context = (generator.random(len(batch)) >= self.config.null_rate).astype(np.float32)[:, None]
            prompt_mask = self._tensor(np.any(wished[batch] != 0, axis=1), torch.float32)
            prompt = self.tower.project_text(self._tensor(wished[batch])) * prompt_mask.unsqueeze(1)
            vectors, text_only = self.tower()
            history = history_inputs(part)
            real = self._tensor(history.mask)
            user, scores = self.ranker(
                self._tensor(features.context_features[batch]),
                self._tensor(features.context_mask[batch] * keep_context),
                prompt,
                prompt_mask,
                functional.embedding(self._tensor(history.items), vectors) * real.unsqueeze(-1),
                self._tensor(history.kinds),
                self._tensor(history.values),
                self._tensor(history.gaps),
                real,
                functional.embedding(self._tensor(slate), vectors),
                self._tensor(features.candidate_features[batch]),
                self._tensor(features.candidate_mask[batch]),
            )
            corrected = scores - self._tensor(log_q[batch])
            # Where the catalogue is smaller than a slate, the positive may come again, and banned items: no negatives.
            again = slate == slate[:, :1]
            again[:, 0] = False
            corrected = corrected.masked_fill(self._tensor(again), -NEVER)
            target = self._tensor(part.target).long()
            listwise = functional.cross_entropy(corrected, torch.zeros_like(target))
            # With the same correction this is noise-contrastive estimation (Gutmann & Hyvärinen 2010).
            truth = torch.zeros_like(scores)
            truth[:, 0] = 1
            logits = self.calibration[0] * corrected + self.calibration[1]
            binary = functional.binary_cross_entropy_with_logits(logits, truth)
            next_item = self._item_losses(user, part.label, vectors, text_only, generator)
            yield next_item + self.config.slate_weight * listwise + self.config.calibration_weight * binary

    def _generator(self, purpose: int, epoch: int) -> np.random.Generator:
        """What an epoch draws from; processes draw apart, the first as if it were alone."""
        rank = (self.devices.rank,) if self.devices.rank else ()
        return np.random.default_rng((self.config.seed, purpose, epoch, *rank))

    def _tensor(self, array: NDArray[Any], dtype: torch.dtype | None = None) -> Tensor:
        return to_tensor(array, self.device, dtype)

    def _autocast(self) -> torch.autocast:
        """Products in bfloat16 where the processor has them; sums, norms and softmax stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bfloat16)

    def _no_context(self, b: int) -> tuple[Tensor, Tensor]:
        empty = torch.zeros(b, self.ranker.shape.context_features, device=self.device)
        return empty, empty


def to_tensor(array: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`array` on `device`, as `dtype` if one is given."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)
