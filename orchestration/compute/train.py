"""Training: next item at every position, then slates of hard candidates; repeatable by seed, resumable by checkpoint.

Stage 1 learns item and user vectors, and what every item gains by its features, by a softmax over the items of the day
at every position of every history. Stage 2 takes recent labels with what was known at their time (features, wish,
slate) and teaches the second head.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from orchestration.compute.batches import HistoryWindows, batches
from orchestration.compute.co_visitation import WindowedPopularity, co_visitation, popularity, positive
from orchestration.compute.evaluate import (
    MakeSlates,
    Queries,
    RankerScorer,
    Scorer,
    SlateFeatures,
    gain,
    history_inputs,
    interval,
    queries_for,
    ranks,
    score_co_visitation,
    score_windowed_popularity,
)
from orchestration.compute.interactions import Interactions
from orchestration.compute.mining import NEVER, SLATE, mine, recent_rows
from orchestration.compute.model import FIRST_EVENT, PROMPT, ItemTower, Ranker, RankerShape
from orchestration.compute.objective import Trends, item_softmax
from orchestration.compute.wishes import Wishes
from schemas.errors import DefinitionError
from schemas.ranker import MAX_HISTORY, TEXT_DIM

SECOND_STAGE = frozenset(
    {"context", "candidate", "candidate_features", "self_bias", "candidate_norm", "correction_hidden", "correction"}
)
"""Parts of the ranker that stage 1 leaves as they were initialised."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Hyper-parameters; the reasons stand beside the values."""

    size: str = "small"
    seed: int = 0
    epochs: int = 16  # the cosine schedule ends here; a million events still gain from 30
    learning_rate: float = 6e-3  # unit vectors and τ = 0.05 bear it; at 3e-3 few events are not learned in time
    weight_decay: float = 0.01
    dropout: float = 0.05  # NDCG@10 0.100 on a validation slice of MovieLens-100K after 10 epochs, 0.096 with 0.1
    temperature: float = 0.05
    batch_tokens: int | None = None  # None: a 64th of the events, 1,024 to 8,192: few events need steps, many speed
    warmup_rate: float = 0.05  # of all steps
    gradient_norm: float = 1.0
    all_items_limit: int = 20_000  # up to here the softmax sees every item; beyond, sampled negatives
    uniform_negatives: int = 512
    popular_negatives: int = 128  # popularity-sampled, corrected by logQ; uniform ones alone leave the head unlearned
    min_item_events: int = 3  # an id seen less often learns noise: such items live by their text
    text_only_weight: float = 0.1  # keeps vectors of new items comparable with those of known ones
    text_only_rate: float = 0.25  # of the positions: the second softmax need not cost as much as the first
    prompt_rate: float = 0.25  # of stage-1 windows that carry a wish
    null_rate: float = 0.3  # context and wish are each withheld this often in stage 2: both may be missing when serving
    slate_epochs: int = 1
    slate_rows: int = 20_000  # labels an epoch at most
    slate_learning_rate: float = 5e-3  # for the parts that start here; see slate_body_rate for the rest
    slate_body_rate: float = 0.05  # of it: the retriever is not to be unlearned on a tenth of its labels
    slate_weight: float = 0.5
    calibration_weight: float = 0.2
    validate_every: int = 3  # epochs
    patience: int = 4  # validations in a row worse than the best before stage 1 ends early
    validation_rate: float = 0.05  # labels come from the newest events, this share of them: tomorrow is what counts
    validation_labels: int = 1000  # at most, at random among those; the rest is learned from


class LabelFeatures(Protocol):
    """What was known at a label's time, for training."""

    def __call__(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
        """A `MakeSlates`: features of label rows `(l,)` and candidate items `(l, n)`."""
        ...

    def trends(self, instants: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Candidate features of every item at `instants (t,)`, microseconds UTC: values and mask `(t, items, g)`."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """One line of a training log. `ndcg_at_10` is None for epochs that were not validated."""

    stage: int
    epoch: int
    epochs: int
    loss: float
    ndcg_at_10: float | None
    seconds: float


@dataclass(slots=True)
class TrainedRanker:
    """A trained model, on the CPU and in evaluation mode, with all that an artefact needs."""

    ranker: Ranker
    tower: ItemTower
    config: TrainConfig
    progress: list[Progress]
    validation: dict[str, float]
    calibration: tuple[float, float]  # probability = sigmoid(scale · score + offset)
    seconds: float

    def item_vectors(self) -> NDArray[np.float32]:
        """`(items, d)`: rows in the order of the catalogue, length 1."""
        with torch.no_grad():
            vectors: NDArray[np.float32] = self.tower()[0].numpy()
        return vectors

    def text_projection(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`weight (d, 384)`, `bias (d,)`: a text's vector is normalise(weight·text + bias)."""
        with torch.no_grad():
            weight, bias = self.tower.affine()
            return weight.numpy(), bias.numpy()

    def item_residuals(self) -> NDArray[np.float32]:
        """`(items, d)`, zero for items without one: v = normalise(projected text + residual)."""
        with torch.no_grad():
            return self.tower.residuals().numpy()

    def run(self, inputs: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`user_vector (b, d)` and `scores (b, n)` for the contract's inputs, as an ONNX session would answer."""
        with torch.no_grad():
            user, scores = self.ranker(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return user.numpy(), scores.numpy()

    def scorer(
        self, slates: MakeSlates | None = None, *, rerank: int | None = 500, sources: tuple[Scorer, ...] = ()
    ) -> RankerScorer:
        """This model as a row of an evaluation."""
        return RankerScorer(
            self.run,
            self.item_vectors(),
            context_features=self.ranker.shape.context_features,
            candidate_features=self.ranker.shape.candidate_features,
            slates=slates,
            rerank=rerank,
            sources=sources,
        )


def train(
    interactions: Interactions,
    text_vectors: NDArray[np.float32],
    config: TrainConfig | None = None,
    *,
    features: LabelFeatures | None = None,
    wishes: Wishes | None = None,
    validation: Queries | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
    device: str | None = None,
) -> TrainedRanker:
    """Train on all of `interactions` but the validation labels.

    `text_vectors (items, 384) float32` are the catalogue's encoded texts in the order of `interactions.item_ids`.
    `validation` holds queries over the same table, whose labels are then left out of training; by default some of
    the newest events. `features` supplies what was known at each label, by row of `interactions`; without it the ranker learns from histories alone. With `checkpoint`, state is saved after every epoch, an
    interrupted run continues from it and ends where an uninterrupted one would; a file left by other data or another
    configuration is ignored and overwritten. `device` defaults to CUDA where there is one.

    Raises DefinitionError if the text vectors do not fit the catalogue or there is nothing to learn from.
    """
    config = config or TrainConfig()
    if text_vectors.shape != (len(interactions.item_ids), TEXT_DIM):
        raise DefinitionError(
            f"text vectors have shape {text_vectors.shape}; the catalogue needs ({len(interactions.item_ids)}, {TEXT_DIM})"
        )
    if validation is None:
        validation = _newest(interactions, config)
    if len(validation.interactions) != len(interactions):
        raise DefinitionError(
            f"the validation labels are rows of a table of {len(validation.interactions)} events, training got "
            f"{len(interactions)}; give both the same table: validation labels are left out of training here"
        )
    keep = np.ones(len(interactions), bool)
    keep[validation.label] = False
    training, rows = interactions.take(keep), np.flatnonzero(keep).astype(np.int64)
    if not positive(training.kind).any():
        raise DefinitionError("there is no positive event to learn from; ingest events before training")
    cuda_devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=cuda_devices):
        recent = np.flatnonzero(np.isin(rows, recent_rows(interactions))).astype(np.int64)
        run = _Run(
            training, rows, recent, text_vectors, config, features, wishes, validation, on_progress, checkpoint, device
        )
        return run.train()


class _Run:
    """One training run: the data, the modules, and where it stands."""

    def __init__(
        self,
        interactions: Interactions,
        rows: NDArray[np.int64],
        recent: NDArray[np.int64],
        text_vectors: NDArray[np.float32],
        config: TrainConfig,
        features: LabelFeatures | None,
        wishes: Wishes | None,
        validation: Queries,
        on_progress: Callable[[Progress], None] | None,
        checkpoint: Path | None,
        device: str | None,
    ) -> None:
        self.interactions = interactions
        self.rows = rows  # (n,) where each training event stands in the caller's table
        self.config = config
        self.features = features
        self.wishes = wishes
        self.on_progress = on_progress
        self.checkpoint = checkpoint
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.validation = validation
        self.counts = popularity(interactions)
        self.neighbours = co_visitation(interactions)
        self.sources = (
            score_windowed_popularity(WindowedPopularity(interactions)),
            score_co_visitation(self.neighbours, self.counts),
        )
        self.positive = positive(interactions.kind)
        self.seconds_at = interactions.occurred_at / 1e6
        self.labels = _slate_labels(interactions, recent, config)
        probe = self._label_features(*_sample(interactions, self.counts, config.seed))
        torch.manual_seed(config.seed)
        self.shape = RankerShape(
            config.size,
            probe.context_features.shape[1],
            probe.candidate_features.shape[2],
            config.temperature,
            config.dropout,
        )
        self.ranker = Ranker(self.shape).to(self.device)
        self.ranker.fit_values(torch.from_numpy(interactions.value))
        self.tower = ItemTower(
            torch.from_numpy(text_vectors),
            self.ranker.user.out_features,
            torch.from_numpy(self.counts >= config.min_item_events),
        ).to(self.device)
        self._fit(probe)
        self.trends = Trends(
            interactions, self.ranker.candidate_features, features.trends if features else None, self.device
        )
        self.batch_tokens = config.batch_tokens or int(np.clip(len(interactions) // 64, 1024, 8192))
        self.windows = HistoryWindows(interactions, self.batch_tokens, config.seed)
        self.calibration = nn.Parameter(torch.tensor([1.0, -math.log(SLATE - 1)], device=self.device))
        self.modules = nn.ModuleDict({"ranker": self.ranker, "tower": self.tower})
        self.stage, self.epoch, self.stale = 1, 0, 0
        self.best: dict[str, Any] = {"ndcg": -1.0, "state": None}
        self.progress: list[Progress] = []
        self.elapsed = 0.0
        fingerprint = hashlib.sha256(repr(sorted(asdict(config).items())).encode())
        for array in (interactions.user, interactions.item, interactions.occurred_at, text_vectors):
            fingerprint.update(np.ascontiguousarray(array).tobytes())
        self.fingerprint = fingerprint.hexdigest()

    def train(self) -> TrainedRanker:
        optimizer, schedule = self._optimizer(
            self.config.learning_rate, self.config.epochs * len(self.windows.epoch(0))
        )
        if self._resume() and self.stage == 1:
            self._load_optimizer(optimizer, schedule)
        if self.stage == 1:
            while self.epoch < self.config.epochs and self.stale < self.config.patience:
                self._epoch(
                    optimizer, schedule, self._next_item_losses(self.epoch), self.config.epochs, self._stage_1_scorer
                )
            self._restore_best()
            self.stage, self.epoch, self.stale = 2, 0, 0
        if self.config.slate_epochs and len(self.labels):
            self._train_slates()
        self._restore_best()
        self.modules.eval().to("cpu")
        if self.checkpoint:
            self.checkpoint.unlink(missing_ok=True)
        scale, offset = self.calibration.detach().cpu().tolist()
        return TrainedRanker(
            self.ranker,
            self.tower,
            self.config,
            self.progress,
            {"ndcg_at_10": self.best["ndcg"]},
            (scale, offset),
            self.elapsed,
        )

    def _train_slates(self) -> None:
        """Stage 2. The slates are mined once, by the retriever that stage 1 left: that is what serving will offer."""
        began = time.monotonic()
        self.modules.eval()
        candidates, log_q = mine(self.labels, self._similarity, self.neighbours, self.trends.absent, self.config.seed)
        features = self._all_features(self.labels.label, candidates)
        steps = len(self._slate_batches(0)) * self.config.slate_epochs
        optimizer, schedule = self._optimizer(
            self.config.slate_learning_rate, steps, body_rate=self.config.slate_body_rate
        )
        if self._pending is not None:
            self._load_optimizer(optimizer, schedule)
        elif len(self.validation):
            # What stage 2 is compared with is stage 1 under stage 2's own measure.
            gains = self._validation_gains(self._slate_scorer)
            self.best = {"ndcg": float(gains.mean()), "state": self._state(), "gains": torch.from_numpy(gains)}
        self.elapsed += time.monotonic() - began
        while self.epoch < self.config.slate_epochs:
            losses = self._slate_losses(self.epoch, candidates, log_q, features)
            self._epoch(optimizer, schedule, losses, self.config.slate_epochs, self._slate_scorer)

    def _epoch(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        losses: Iterator[Tensor],
        epochs: int,
        scorer: Scorer,
    ) -> None:
        """Step through `losses`, validate when due, keep the best, save."""
        began = time.monotonic()
        # Each epoch has its own seed, so a run resumed after epoch k draws what the uninterrupted one drew.
        torch.manual_seed(self.config.seed * 1_000_003 + self.stage * 1009 + self.epoch)
        self.modules.train()
        total, steps = 0.0, 0
        for loss in losses:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            nn.utils.clip_grad_norm_(self.modules.parameters(), self.config.gradient_norm)
            optimizer.step()
            schedule.step()
            total, steps = total + float(loss.detach()), steps + 1
        self.epoch += 1
        ndcg = None
        if len(self.validation) and (
            self.stage == 2 or self.epoch % self.config.validate_every == 0 or self.epoch == epochs
        ):
            self.modules.eval()
            gains = self._validation_gains(scorer)
            ndcg = float(gains.mean())
            if self._keeps(gains):
                self.best, self.stale = {"ndcg": ndcg, "state": self._state(), "gains": torch.from_numpy(gains)}, 0
            else:
                self.stale += 1
        seconds = time.monotonic() - began
        self.elapsed += seconds
        self.progress.append(Progress(self.stage, self.epoch, epochs, total / max(steps, 1), ndcg, seconds))
        self._save(optimizer, schedule)
        if self.on_progress:
            self.on_progress(self.progress[-1])

    def _optimizer(
        self, learning_rate: float, steps: int, *, body_rate: float = 1.0
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        """AdamW with linear warm-up and a cosine down to zero; what stage 1 trained learns at `body_rate` of the rate."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.modules.named_parameters():
            new = name.split(".")[1] in SECOND_STAGE
            groups.setdefault((new, parameter.ndim > 1), []).append(parameter)
        groups.setdefault((True, False), []).append(self.calibration)
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": learning_rate * (1.0 if new else body_rate),
                    "weight_decay": self.config.weight_decay * matrix,
                }
                for (new, matrix), parameters in groups.items()
            ],
            betas=(0.9, 0.98),
        )
        warm = max(1, int(steps * self.config.warmup_rate))

        def rate(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    # ---- stage 1

    def _next_item_losses(self, epoch: int) -> Iterator[Tensor]:
        """One loss per batch: next-item softmax at every position, with and without ids in the item vectors."""
        generator = np.random.default_rng((self.config.seed, 2, epoch))
        events = self.interactions
        for windows in self.windows.epoch(epoch):
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
            counted = np.concatenate([starts > 0, real], axis=1) & self.positive[target_row]
            prompt, prompt_mask = self._window_wishes(target_row, counted, generator)
            vectors, text_only = self.tower()
            tokens = self.ranker.prefix(
                *self._no_context(len(windows)),
                prompt,
                prompt_mask,
                functional.embedding(self._tensor(events.item[row]), vectors)
                * self._tensor(real, vectors.dtype).unsqueeze(-1),
                self._tensor(np.where(real, events.kind[row], 0)),
                self._tensor(np.where(real, np.nan_to_num(events.value[row]), 0), torch.float32),
                self._tensor(gaps, torch.float32),
            )
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
        """Softmax of `users (m, d)` for label rows `(m,)` over items, plus its text-only twin on a share of the rows."""
        target = self._tensor(self.interactions.item[rows]).long()
        when = self._tensor(self.trends.when(self.interactions.occurred_at[rows]))
        trend = self.trends.present(self.trends.gains(self.ranker.trend.weight))
        loss = item_softmax(users, target, vectors, trend, when, self.config, self.counts, generator)
        if self.config.text_only_weight:
            part = self._tensor(generator.random(len(users)) < self.config.text_only_rate)
            loss = loss + self.config.text_only_weight * item_softmax(
                users[part], target[part], text_only, trend, when[part], self.config, self.counts, generator
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

    # ---- stage 2

    def _slate_batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Batches of indices into the labels, at most `slate_rows` an epoch, of similar history length."""
        generator = np.random.default_rng((self.config.seed, 4, epoch))
        chosen = generator.permutation(len(self.labels))[: self.config.slate_rows]
        length = np.minimum(self.labels.stop - self.labels.start, MAX_HISTORY)[chosen]
        order = np.argsort(length * generator.uniform(0.9, 1.1, len(length)), kind="stable")
        tokens = length[order] + FIRST_EVENT + SLATE
        return [batch[:, 0] for batch in batches(chosen[order][:, None], tokens, 2 * self.batch_tokens, generator)]

    def _slate_losses(
        self, epoch: int, candidates: NDArray[np.int32], log_q: NDArray[np.float32], features: SlateFeatures
    ) -> Iterator[Tensor]:
        """One loss per batch: softmax through u over all items, softmax and calibrated BCE over the slate."""
        generator = np.random.default_rng((self.config.seed, 5, epoch))
        for batch in self._slate_batches(epoch):
            part, slate = self.labels.take(batch), candidates[batch]
            keep_context = (generator.random(len(batch)) >= self.config.null_rate).astype(np.float32)[:, None]
            prompt = torch.zeros(len(batch), self.ranker.user.out_features, device=self.device)
            prompt_mask = torch.zeros(len(batch), device=self.device)
            if self.wishes is not None:
                texts, meant = self.wishes.draw(part.target, generator)
                given = meant.any(1) & (generator.random(len(batch)) >= self.config.null_rate)
                prompt_mask = self._tensor(given, torch.float32)
                prompt = self.tower.project_text(self._tensor(texts)) * prompt_mask.unsqueeze(1)
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

    def _label_features(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
        if self.features is not None:
            return self.features(self.rows[rows], candidates)
        empty, slate = np.zeros((len(rows), 1), np.float32), np.zeros((*candidates.shape, 1), np.float32)
        return SlateFeatures(empty, empty, slate, slate)

    def _fit(self, sample: SlateFeatures) -> None:
        """Statistics by which features are standardised, in both stages and ever after."""
        for encoder, values, mask in (
            (self.ranker.context, sample.context_features, sample.context_mask),
            (self.ranker.candidate_features, sample.candidate_features, sample.candidate_mask),
        ):
            encoder.fit(self._tensor(values), self._tensor(mask))

    def _all_features(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
        """Features of every label, asked for in pieces that fit the memory of whoever computes them."""
        parts = [self._label_features(rows[i : i + 4096], candidates[i : i + 4096]) for i in range(0, len(rows), 4096)]
        return SlateFeatures(
            np.concatenate([part.context_features for part in parts]),
            np.concatenate([part.context_mask for part in parts]),
            np.concatenate([part.candidate_features for part in parts]),
            np.concatenate([part.candidate_mask for part in parts]),
        )

    # ---- validation, state

    def _validation_gains(self, scorer: Scorer) -> NDArray[np.float64]:
        """`(labels,)` NDCG@10 of each validation label."""
        return gain(ranks(scorer, self.validation), 10)

    def _keeps(self, gains: NDArray[np.float64]) -> bool:
        """Whether a validation `(labels,)` replaces the best so far.

        The newest does, unless it is worse beyond chance: a few hundred labels tell small differences badly, and the
        best of many noisy looks lies in the middle of the learning rate's schedule, where nothing is settled.
        """
        if self.best["state"] is None:
            return True
        difference = gains - self.best["gains"].numpy()
        return bool(interval(difference, self.validation.user)[1] >= 0)

    def _scorer(
        self, *, rerank: int | None, slates: MakeSlates | None, sources: tuple[Scorer, ...] = ()
    ) -> RankerScorer:
        def run(inputs: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            with torch.no_grad():
                user, scores = self.ranker(**{name: self._tensor(value) for name, value in inputs.items()})
            return user.cpu().numpy(), scores.cpu().numpy()

        with torch.no_grad():
            vectors = self.tower()[0].cpu().numpy()
        return RankerScorer(
            run,
            vectors,
            context_features=self.shape.context_features,
            candidate_features=self.shape.candidate_features,
            slates=slates,
            rerank=rerank,
            sources=sources,
        )

    def _similarity(self, queries: Queries) -> NDArray[np.float32]:
        """⟨u, v⟩/τ of every item: what the ANN index will see."""
        logits: NDArray[np.float32] = self._scorer(rerank=0, slates=None)(queries) / np.float32(self.config.temperature)
        return logits

    def _stage_1_scorer(self, queries: Queries) -> NDArray[np.float32]:
        """⟨u, v⟩/τ + what every item gains by its features: what stage 1 learns."""
        with torch.no_grad():
            gains = self.trends.gains(self.ranker.trend.weight).cpu().numpy()
        scores: NDArray[np.float32] = self._similarity(queries) + gains[self.trends.when(queries.at)]
        return scores

    def _slate_scorer(self, queries: Queries) -> NDArray[np.float32]:
        """The candidates that serving would offer, re-ranked with what was known at each label's time."""
        return self._scorer(rerank=2 * SLATE, slates=self.features, sources=self.sources)(queries)

    def _state(self) -> dict[str, Any]:
        state = {name: value.detach().cpu().clone() for name, value in self.modules.state_dict().items()}
        return {"modules": state, "calibration": self.calibration.detach().cpu().clone()}

    def _restore(self, state: dict[str, Any]) -> None:
        self.modules.load_state_dict(state["modules"])
        with torch.no_grad():
            self.calibration.copy_(state["calibration"])

    def _restore_best(self) -> None:
        if self.best["state"] is not None:
            self._restore(self.best["state"])

    def _save(self, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
        """Write the state beside the checkpoint and rename it: Ctrl-C leaves the old file or the new one."""
        if self.checkpoint is None:
            return
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(self.checkpoint.suffix + ".part")
        state = {
            "fingerprint": self.fingerprint,
            "position": (self.stage, self.epoch, self.stale, self.elapsed),
            "state": self._state(),
            "best": self.best,
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "progress": [asdict(line) for line in self.progress],
        }
        torch.save(state, part)
        os.replace(part, self.checkpoint)

    _pending: dict[str, Any] | None = None
    """A checkpoint that was read and whose optimizer is still to be restored."""

    def _resume(self) -> bool:
        if self.checkpoint is None or not self.checkpoint.is_file():
            return False
        saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if saved["fingerprint"] != self.fingerprint:
            return False
        self.stage, self.epoch, self.stale, self.elapsed = saved["position"]
        self._restore(saved["state"])
        self.best = saved["best"]
        self.progress = [Progress(**line) for line in saved["progress"]]
        self._pending = saved
        return True

    def _load_optimizer(self, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
        if self._pending is not None:
            optimizer.load_state_dict(self._pending["optimizer"])
            schedule.load_state_dict(self._pending["schedule"])
            self._pending = None

    def _tensor(self, array: NDArray[Any], dtype: torch.dtype | None = None) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=self.device, dtype=dtype)

    def _no_context(self, b: int) -> tuple[Tensor, Tensor]:
        empty = torch.zeros(b, self.shape.context_features, device=self.device)
        return empty, empty


def _newest(interactions: Interactions, config: TrainConfig) -> Queries:
    """Some of the newest labels, each with the history that was visible in an earlier second."""
    since = np.quantile(interactions.occurred_at, 1 - config.validation_rate, method="lower")
    newest = queries_for(
        interactions, np.flatnonzero(interactions.occurred_at >= since).astype(np.int64), strictly_earlier=True
    )
    chosen = np.random.default_rng(config.seed).permutation(len(newest))[: config.validation_labels]
    return newest.take(np.sort(chosen))


def _slate_labels(interactions: Interactions, recent: NDArray[np.int64], config: TrainConfig) -> Queries:
    """Some of the `recent` rows at random, with the history that was visible in an earlier second: as a request would see it."""
    # Mining costs a pass of the ranker per label: none is mined that no epoch will use.
    most = config.slate_rows * max(config.slate_epochs, 1)
    rows = np.sort(np.random.default_rng((config.seed, 6)).permutation(recent)[:most])
    return queries_for(interactions, rows, strictly_earlier=True)


def _sample(
    interactions: Interactions, counts: NDArray[np.float32], seed: int, size: int = 512
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Some label rows `(l,)` with some candidates `(l, 64)`, popular ones more often."""
    generator = np.random.default_rng((seed, 7))
    rows = np.sort(generator.permutation(len(interactions))[:size]).astype(np.int64)
    share = np.cumsum(counts / counts.sum())
    items = np.searchsorted(share, generator.random((len(rows), SLATE))).clip(max=len(share) - 1)
    return rows, items.astype(np.int32)
