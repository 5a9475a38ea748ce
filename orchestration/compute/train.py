"""Training: next item at every position, then slates of hard candidates; repeatable by seed, resumable by checkpoint.

Stage 1 learns item and user vectors by a softmax over all items at every position of every history. Stage 2 takes
each person's last labels with what was known at their time (features, wish, slate) and teaches the second head.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from orchestration.compute.co_visitation import co_visitation, popularity, positive
from orchestration.compute.evaluate import (
    MakeSlates,
    Queries,
    RankerScorer,
    Scorer,
    SlateFeatures,
    gain,
    history_inputs,
    queries_for,
    ranks,
)
from orchestration.compute.interactions import Interactions
from orchestration.compute.model import FIRST_EVENT, PROMPT, ItemTower, Ranker, RankerShape
from schemas.errors import DefinitionError
from schemas.ranker import MAX_HISTORY, TEXT_DIM

SLATE = 64
"""Candidates of a training slate: the positive, then 63 mined negatives."""
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
    learning_rate: float = (
        8e-3  # unit vectors and τ = 0.05 bear it; at 3e-3 a small history of events is not learned in time
    )
    weight_decay: float = 0.01
    dropout: float = 0.05  # so few epochs underfit: NDCG@10 0.141 on MovieLens-100K, 0.127 with 0.1 and 12 epochs
    temperature: float = 0.05
    batch_tokens: int | None = (
        None  # None: a hundredth of the events, 1,024 to 8,192: few events need steps, many speed
    )
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
    slate_labels: int = 10  # per person: more would be millions of rows for little
    slate_rows: int = 20_000  # label rows an epoch at most
    slate_learning_rate: float = 3e-3  # for the parts that start here; see slate_body_rate for the rest
    slate_body_rate: float = 0.05  # of it: the retriever is not to be unlearned on a tenth of its labels
    slate_weight: float = 0.5
    calibration_weight: float = 0.2
    validate_every: int = 3  # epochs
    patience: int = 4  # validations without a new best before stage 1 ends early
    validation_people: int = 1000


@dataclass(frozen=True, slots=True)
class Wishes:
    """What training wishes are made of: `category_vectors (c, 384)` encoded wishes, `item_categories (items, c) bool`."""

    category_vectors: NDArray[np.float32]
    item_categories: NDArray[np.bool_]

    def draw(
        self, items: NDArray[np.int32], generator: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """A wish for each of `items (m,)`, which the person went on to like: the mean of one or two of its categories.

        Returns `(m, 384)` text vectors (zero where the item has no category) and `(m, c)` the categories meant.
        """
        noise = generator.random((len(items), self.item_categories.shape[1])) * self.item_categories[items]
        rank = np.argsort(np.argsort(-noise, axis=1, kind="stable"), axis=1, kind="stable")
        meant = (rank < generator.integers(1, 3, len(items))[:, None]) & (noise > 0)
        vectors = meant.astype(np.float32) @ self.category_vectors
        norm = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.maximum(norm, 1e-9)).astype(np.float32), meant


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
    slates: MakeSlates | None = None,
    wishes: Wishes | None = None,
    validation: Queries | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
    device: str | None = None,
) -> TrainedRanker:
    """Train on all of `interactions` but the validation labels.

    `text_vectors (items, 384) float32` are the catalogue's encoded texts in the order of `interactions.item_ids`.
    `validation` holds queries over the same table, whose labels are then left out of training; by default each
    person's last event, of those with three or more. `slates` supplies features as of each label, by row of
    `interactions`; without it the ranker learns from histories alone. With `checkpoint`, state is saved after every epoch, an
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
        last = interactions.offsets()[1:][np.diff(interactions.offsets()) >= 3] - 1
        validation = queries_for(interactions, last, strictly_earlier=False)
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
        run = _Run(training, rows, text_vectors, config, slates, wishes, validation, on_progress, checkpoint, device)
        return run.train()


class _Run:
    """One training run: the data, the modules, and where it stands."""

    def __init__(
        self,
        interactions: Interactions,
        rows: NDArray[np.int64],
        text_vectors: NDArray[np.float32],
        config: TrainConfig,
        slates: MakeSlates | None,
        wishes: Wishes | None,
        validation: Queries,
        on_progress: Callable[[Progress], None] | None,
        checkpoint: Path | None,
        device: str | None,
    ) -> None:
        self.interactions = interactions
        self.rows = rows  # (n,) where each training event stands in the caller's table
        self.config = config
        self.slates = slates
        self.wishes = wishes
        self.on_progress = on_progress
        self.checkpoint = checkpoint
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = np.random.default_rng(config.seed).permutation(len(validation))[: config.validation_people]
        self.validation = validation.take(np.sort(chosen))
        self.counts = popularity(interactions)
        self.positive = positive(interactions.kind)
        self.seconds_at = interactions.occurred_at / 1e6
        self.labels = _slate_labels(interactions, config)
        probe = self._features(self.labels.label[:1], np.zeros((min(1, len(self.labels)), SLATE), np.int32))
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
        self.batch_tokens = config.batch_tokens or int(np.clip(len(interactions) // 100, 1024, 8192))
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
        optimizer, schedule = self._optimizer(self.config.learning_rate, self.config.epochs * len(self._windows(0)))
        if self._resume() and self.stage == 1:
            self._load_optimizer(optimizer, schedule)
        if self.stage == 1:
            while self.epoch < self.config.epochs and self.stale < self.config.patience:
                self._epoch(
                    optimizer, schedule, self._next_item_losses(self.epoch), self.config.epochs, self._retrieval_scorer
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
        candidates, log_q = self._mine()
        features = self._all_features(self.labels.label, candidates)
        for encoder, values, mask in (
            (self.ranker.context, features.context_features, features.context_mask),
            (self.ranker.candidate_features, features.candidate_features, features.candidate_mask),
        ):
            encoder.fit(torch.from_numpy(values).to(self.device), torch.from_numpy(mask).to(self.device))
        steps = len(self._slate_batches(0)) * self.config.slate_epochs
        optimizer, schedule = self._optimizer(
            self.config.slate_learning_rate, steps, body_rate=self.config.slate_body_rate
        )
        if self._pending is not None:
            self._load_optimizer(optimizer, schedule)
        else:
            # What stage 2 has to beat is stage 1 under stage 2's own measure: the same list, not yet re-ranked.
            self.best = {"ndcg": self._validate(self._slate_scorer), "state": self._state()}
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
        scorer: Callable[[Queries], NDArray[np.float32]],
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
            ndcg = self._validate(scorer)
            if ndcg > self.best["ndcg"]:
                self.best, self.stale = {"ndcg": ndcg, "state": self._state()}, 0
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

    def _windows(self, epoch: int) -> list[NDArray[np.int64]]:
        """Batches of windows `(b, 3)`: first row, row after the last, 1 where the window begins its person's history.

        A person with more events than fit is cut at a place that changes with the epoch. Batches hold windows of
        similar length and about `batch_tokens` tokens.
        """
        generator = np.random.default_rng((self.config.seed, 1, epoch))
        offsets = self.interactions.offsets()
        size = MAX_HISTORY + 1  # the last event is only a target
        windows: list[tuple[int, int, int]] = []
        phase = generator.integers(0, size, len(offsets) - 1)
        for person, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            begin = first
            stop = end if end - first <= size else first + int(phase[person]) % size + 1
            while begin < end:
                windows.append((begin, stop, int(begin == first)))
                # One event of overlap: the last target of a window is the first input of the next.
                begin, stop = (end, end) if stop == end else (stop - 1, min(stop - 1 + size, end))
        table = np.array(windows, np.int64).reshape(-1, 3)
        length = table[:, 1] - table[:, 0]
        # Jitter mixes neighbours in length, or the same people would meet in every epoch.
        order = np.argsort(length * generator.uniform(0.9, 1.1, len(length)), kind="stable")
        return _batches(table[order], length[order] + FIRST_EVENT, self.batch_tokens, generator)

    def _next_item_losses(self, epoch: int) -> Iterator[Tensor]:
        """One loss per batch: next-item softmax at every position, with and without ids in the item vectors."""
        generator = np.random.default_rng((self.config.seed, 2, epoch))
        events = self.interactions
        for windows in self._windows(epoch):
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
            users = self.ranker.user_vectors(states[:, PROMPT:][self._tensor(counted)])  # (m, d)
            target = self._tensor(events.item[target_row][counted]).long()
            yield self._item_losses(users, target, vectors, text_only, generator)

    def _item_losses(
        self, users: Tensor, target: Tensor, vectors: Tensor, text_only: Tensor, generator: np.random.Generator
    ) -> Tensor:
        """Softmax of `users (m, d)` over items, plus its text-only twin on a share of the rows."""
        loss = self._softmax(users, target, vectors, generator)
        if self.config.text_only_weight:
            part = self._tensor(generator.random(len(users)) < self.config.text_only_rate)
            loss = loss + self.config.text_only_weight * self._softmax(users[part], target[part], text_only, generator)
        return loss

    def _softmax(self, users: Tensor, target: Tensor, vectors: Tensor, generator: np.random.Generator) -> Tensor:
        """Mean cross-entropy of `target (m,)` among all items, or among shared negatives in a large catalogue."""
        temperature = self.config.temperature
        if len(users) == 0:
            return vectors.sum() * 0
        if len(vectors) <= self.config.all_items_limit:
            loss: Tensor = _AllItemsSoftmax.apply(users, vectors, target, temperature)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return loss
        uniform = generator.integers(0, len(vectors), self.config.uniform_negatives)
        share = self.counts / self.counts.sum()
        popular = np.searchsorted(np.cumsum(share), generator.random(self.config.popular_negatives)).clip(
            max=len(share) - 1
        )
        drawn = np.concatenate([uniform, popular])
        expected = self.config.uniform_negatives / len(share) + self.config.popular_negatives * share[drawn]
        negatives = self._tensor(drawn)
        logits = users @ vectors[negatives].T / temperature - self._tensor(np.log(expected), torch.float32)  # (m, s)
        logits = logits.masked_fill(negatives.unsqueeze(0) == target.unsqueeze(1), -1e4)
        own = (users * vectors[target]).sum(-1, keepdim=True) / temperature  # (m, 1)
        return functional.cross_entropy(torch.cat([own, logits], dim=1), torch.zeros_like(target))

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

    def _mine(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Slates `(labels, 64)`, the positive first, and the log of how often each candidate was to be expected there.

        Negatives come from the sources that serving draws from: a third are the retriever's own top items, a third
        follow the last events by counts, the rest are popular or uniform; never an item the person had before the
        label. Without the correction by the second array the ranker would learn that what its sources like is wrong.
        """
        neighbours = co_visitation(self.interactions)
        generator = np.random.default_rng((self.config.seed, 3))
        popular = self.counts / self.counts.sum()
        negatives = SLATE - 1
        quota = np.array([negatives // 3, negatives // 3, negatives // 6])
        quota = np.append(quota, negatives - quota.sum())
        items = np.empty((len(self.labels), SLATE), np.int32)
        log_q = np.zeros((len(self.labels), SLATE), np.float32)
        for begin in range(0, len(self.labels), 256):
            part = self.labels.take(slice(begin, begin + 256))
            here = np.arange(len(part))
            banned = part.seen()
            banned[here, part.target] = True
            similarity = self._retrieval_scorer(part) / self.config.temperature
            sources = (
                np.exp(similarity - similarity.max(axis=1, keepdims=True)),
                neighbours.score_histories(part.histories()),
                np.broadcast_to(popular, banned.shape),
                np.ones(banned.shape),
            )
            expected = np.zeros(banned.shape)
            for source, count in zip(sources, quota, strict=True):
                weight = np.where(banned, 0, source)
                expected += count * weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-12)
            # Drawn without repetition in proportion to what the sources expect together (Gumbel top-k, Kool et al. 2019).
            draw = np.where(banned, -np.inf, np.log(np.maximum(expected, 1e-12)) + generator.gumbel(size=banned.shape))
            count = min(negatives, draw.shape[1])
            top = np.argpartition(-draw, count - 1, axis=1)[:, :count]
            # A catalogue smaller than a slate: the rest repeats what was picked.
            top = np.concatenate([part.target[:, None], top], axis=1)[:, np.arange(SLATE) % (count + 1)]
            items[begin : begin + 256] = top
            log_q[begin : begin + 256] = np.log(np.clip(expected[here[:, None], top], 1e-6, 1))
            # A person who had nearly everything: what must not be offered is no negative either.
            log_q[begin : begin + 256][banned[here[:, None], top]] = 1e4
        log_q[:, 0] = 0
        return items, log_q

    def _slate_batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Batches of indices into the labels, at most `slate_rows` an epoch, of similar history length."""
        generator = np.random.default_rng((self.config.seed, 4, epoch))
        chosen = generator.permutation(len(self.labels))[: self.config.slate_rows]
        length = np.minimum(self.labels.stop - self.labels.start, MAX_HISTORY)[chosen]
        order = np.argsort(length * generator.uniform(0.9, 1.1, len(length)), kind="stable")
        tokens = length[order] + FIRST_EVENT + SLATE
        return [batch[:, 0] for batch in _batches(chosen[order][:, None], tokens, 2 * self.batch_tokens, generator)]

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
            corrected = corrected.masked_fill(self._tensor(again), -1e4)
            target = self._tensor(part.target).long()
            listwise = functional.cross_entropy(corrected, torch.zeros_like(target))
            # With the same correction this is noise-contrastive estimation (Gutmann & Hyvärinen 2010).
            truth = torch.zeros_like(scores)
            truth[:, 0] = 1
            logits = self.calibration[0] * corrected + self.calibration[1]
            binary = functional.binary_cross_entropy_with_logits(logits, truth)
            next_item = self._item_losses(user, target, vectors, text_only, generator)
            yield next_item + self.config.slate_weight * listwise + self.config.calibration_weight * binary

    def _features(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
        if self.slates is not None:
            return self.slates(self.rows[rows], candidates)
        empty, slate = np.zeros((len(rows), 1), np.float32), np.zeros((*candidates.shape, 1), np.float32)
        return SlateFeatures(empty, empty, slate, slate)

    def _all_features(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
        """Features of every label, asked for in pieces that fit the memory of whoever computes them."""
        parts = [self._features(rows[i : i + 4096], candidates[i : i + 4096]) for i in range(0, len(rows), 4096)]
        return SlateFeatures(
            np.concatenate([part.context_features for part in parts]),
            np.concatenate([part.context_mask for part in parts]),
            np.concatenate([part.candidate_features for part in parts]),
            np.concatenate([part.candidate_mask for part in parts]),
        )

    # ---- validation, state

    def _validate(self, scorer: Callable[[Queries], NDArray[np.float32]]) -> float:
        return float(gain(ranks(scorer, self.validation, batch=32), 10).mean())

    def _scorer(self, *, rerank: int | None, slates: MakeSlates | None) -> RankerScorer:
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
        )

    def _retrieval_scorer(self, queries: Queries) -> NDArray[np.float32]:
        """⟨u, v⟩ of every item: what stage 1 learns and the ANN index will see."""
        return self._scorer(rerank=0, slates=None)(queries)

    def _slate_scorer(self, queries: Queries) -> NDArray[np.float32]:
        """The retriever's first items, re-ranked with what was known at each label's time."""
        return self._scorer(rerank=SLATE, slates=self.slates)(queries)

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


class _AllItemsSoftmax(torch.autograd.Function):
    """Mean cross-entropy over all items, with its gradient made in the forward pass (as in Liger Kernel, 2024).

    The (m, items) table of logits is built piece by piece, turned into its own gradient in place and dropped: written
    once where autograd would keep and rewrite it four times. Unit vectors bound the logits, so exp needs no maximum.
    """

    CELLS = 1 << 19  # of the table at a time: two megabytes stay in a core's cache

    @staticmethod
    def forward(ctx: Any, users: Tensor, vectors: Tensor, target: Tensor, temperature: float) -> Tensor:
        m, items = len(users), len(vectors)
        rows = max(16, min(m, _AllItemsSoftmax.CELLS // items))
        user_gradient, item_gradient = torch.empty_like(users), torch.zeros_like(vectors)
        table, index = users.new_empty(rows, items), torch.arange(rows, device=users.device)
        total = users.new_zeros(())
        for begin in range(0, m, rows):
            part, wanted = users[begin : begin + rows], target[begin : begin + rows]
            own = (part * vectors[wanted]).sum(-1) / temperature
            weight = torch.mm(part / temperature, vectors.T, out=table[: len(part)])  # (rows, items)
            weight.sub_(1 / temperature).exp_()
            normaliser = weight.sum(-1)
            total = total + (normaliser.log() + 1 / temperature - own).sum()
            weight.div_(normaliser.unsqueeze(-1) * (m * temperature))
            weight[index[: len(part)], wanted] -= 1 / (m * temperature)
            torch.mm(weight, vectors, out=user_gradient[begin : begin + rows])
            item_gradient.addmm_(weight.T, part)
        ctx.save_for_backward(user_gradient, item_gradient)
        return total / m

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        user_gradient, item_gradient = ctx.saved_tensors
        return gradients[0] * user_gradient, gradients[0] * item_gradient, None, None


def _slate_labels(interactions: Interactions, config: TrainConfig) -> Queries:
    """Each person's last labels, with the history that was visible in an earlier second: as a request would see it."""
    offsets = interactions.offsets()
    position = np.arange(len(interactions))
    last = position >= offsets[1:][interactions.user] - config.slate_labels
    rows = np.flatnonzero(last).astype(np.int64)
    # Mining costs a pass of the ranker per label: none is mined that no epoch will use.
    most = config.slate_rows * max(config.slate_epochs, 1)
    if len(rows) > most:
        rows = np.sort(np.random.default_rng((config.seed, 6)).permutation(rows)[:most])
    return queries_for(interactions, rows, strictly_earlier=True)


def _batches(
    table: NDArray[np.int64], tokens: NDArray[np.int64], budget: int, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Cut `table (m, …)`, sorted by `tokens (m,)`, into batches whose padded size stays near `budget`; shuffled."""
    batches: list[NDArray[np.int64]] = []
    begin = 0
    while begin < len(table):
        stop = begin + 1
        widest = int(tokens[begin])
        while stop < len(table) and max(widest, int(tokens[stop])) * (stop + 1 - begin) <= budget:
            widest = max(widest, int(tokens[stop]))
            stop += 1
        batches.append(table[begin:stop])
        begin = stop
    return [batches[i] for i in generator.permutation(len(batches))]
