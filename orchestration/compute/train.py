"""Training: next item at every position, then slates of hard candidates; repeatable by seed, resumable by checkpoint.

Stage 1 solves for what every item gains by its features, then learns item and user vectors beside that, by a softmax over
the items of the day at every position of every history; the newest labels it leaves out. Stage 2 takes those, and others of
the recent ones, with what was known at their time (features, wish, slate): it weighs vectors and features against each other
on the labels that stage 1 never saw, and teaches the second head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestration.compute import checkpoint as checkpoints
from orchestration.compute.co_visitation import WindowedPopularity, co_visitation, popularity, positive
from orchestration.compute.devices import Devices
from orchestration.compute.evaluate import (
    Scorer,
    SlateFeatures,
    gain,
    interval,
    ranks,
    score_co_visitation,
    score_windowed_popularity,
)
from orchestration.compute.impressions import PassedOver
from orchestration.compute.interactions import Interactions
from orchestration.compute.losses import Losses, to_tensor
from orchestration.compute.mining import (
    NEVER,
    SLATE,
    Sources,
    held_rows,
    mine,
    newest_labels,
    random_slates,
    recent_rows,
    slate_labels,
)
from orchestration.compute.model import ItemTower, Ranker, RankerShape
from orchestration.compute.objective import Trends
from orchestration.compute.optimizer import adamw
from orchestration.compute.splits import Queries
from orchestration.compute.stacking import stack
from orchestration.compute.telling import Say, now_and_then, silent
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.trained_ranker import Progress, TrainedRanker
from orchestration.compute.training_features import FiniteFeatures, LabelFeatures
from orchestration.compute.training_scorers import TrainingScorers
from orchestration.compute.wishes import Wishes
from schemas.errors import DefinitionError, GateError
from schemas.ranker import TEXT_DIM


def train(
    interactions: Interactions,
    text_vectors: NDArray[np.float32],
    config: TrainConfig | None = None,
    *,
    features: LabelFeatures | None = None,
    wishes: Wishes | None = None,
    validation: Queries | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    say: Say = silent,
    checkpoint: Path | None = None,
    device: str | None = None,
    passed_over: PassedOver | None = None,
) -> TrainedRanker:
    """Train on all of `interactions` but the validation labels.

    `text_vectors (items, 384) float32` are the catalogue's encoded texts in the order of `interactions.item_ids`.
    `validation` holds queries over the same table, whose labels are then left out of training; by default some of
    the newest events. `features` supplies what was known at each label, by row of `interactions`; without it the ranker
    learns from histories alone. With `checkpoint`, state is saved after every epoch, an interrupted run continues from it
    and ends where an uninterrupted one would, and a finished one has no epoch to repeat; a file left by other data (of
    `features`, a sample is compared) or another configuration is ignored and overwritten. The file is the caller's to
    remove once the model is kept. `passed_over` is what people were shown and did not choose, for the slates; indices are
    those of `interactions`. `device` defaults to CUDA where there is one. In each of several processes started by
    `accelerate launch`, all given the same, the run is one run on all their devices; the first reports and saves.
    `on_progress` is called after each epoch, `say` with words about what goes on in between.

    Raises DefinitionError if the text vectors do not fit the catalogue or hold what is no number, the validation labels
    are rows of another table or there is nothing to learn from, and GateError where a loss or gradient is not finite.
    """
    config = config or TrainConfig()
    if text_vectors.shape != (len(interactions.item_ids), TEXT_DIM):
        raise DefinitionError(
            f"text vectors have shape {text_vectors.shape}; the catalogue needs ({len(interactions.item_ids)}, {TEXT_DIM})"
        )
    if not np.isfinite(text_vectors).all():
        broken = interactions.item_ids[~np.isfinite(text_vectors).all(1)]
        raise DefinitionError(
            f"the text vectors of {len(broken)} items hold NaN or infinity: {broken[:5]}; encode again"
        )
    if features is not None:
        features = FiniteFeatures(features)
    if validation is None:
        validation = newest_labels(interactions, config)
    judged = validation.interactions
    if judged is not interactions and (
        checkpoints.fingerprint(*judged.arrays()) != checkpoints.fingerprint(*interactions.arrays())
    ):
        raise DefinitionError(
            f"the validation labels are rows of another table ({len(judged)} events) than training got "
            f"({len(interactions)} events); give both the same: validation labels are left out of training here"
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
        run.say, run.passed_over = say, passed_over
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
        self.on_progress = on_progress
        self.checkpoint = checkpoint
        self.devices = Devices(device)
        self.device = self.devices.device
        self.validation = validation
        self.counts = popularity(interactions)
        self.neighbours = co_visitation(interactions)
        self.trending = WindowedPopularity(interactions)
        self.held = held_rows(interactions, config)
        self.labels = slate_labels(interactions, recent, self.held, config)
        self.texts = text_vectors
        self.wished = np.zeros((len(self.labels), TEXT_DIM), np.float32)
        if wishes is not None:
            drawn = np.random.default_rng((config.seed, 8))
            self.wished = wishes.draw_some(self.labels.target, drawn, config.null_rate)
        probe = self._label_features(*random_slates(interactions, self.counts, config.seed))
        torch.manual_seed(config.seed)
        shape = RankerShape(
            config.size,
            probe.context_features.shape[1],
            probe.candidate_features.shape[2],
            gaps=config.gaps,
            temperature=config.temperature,
            dropout=config.dropout,
        )
        self.ranker = Ranker(shape).to(self.device)
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
        self.calibration = nn.Parameter(torch.tensor([1.0, -math.log(SLATE - 1)], device=self.device))
        self.scorers = TrainingScorers(
            self.ranker,
            self.tower,
            self.trends,
            config.temperature,
            self.device,
            self.labels,
            self.wished,
            features,
            (score_windowed_popularity(self.trending), score_co_visitation(self.neighbours, self.counts)),
        )
        self.losses = Losses(
            interactions,
            self.counts,
            wishes,
            self.ranker,
            self.tower,
            self.trends,
            self.calibration,
            config,
            self.devices,
            self.held,
        )
        self.modules = nn.ModuleDict({"ranker": self.ranker, "tower": self.tower})
        self.stage, self.epoch, self.stale = 1, 0, 0
        self.best: dict[str, Any] = {"ndcg": None, "state": None}
        self.mined: tuple[NDArray[np.int32], NDArray[np.float32]] | None = None
        self.passed_over: PassedOver | None = None
        self.say: Say = silent
        self.epoch_steps = 0
        self.progress: list[Progress] = []
        self.elapsed = 0.0
        self.fingerprint = checkpoints.fingerprint(
            repr(config),
            text_vectors,
            *validation.interactions.arrays(),
            *(validation.label, validation.start, validation.stop),
            *((wishes.category_vectors, wishes.item_categories) if wishes else (None, None)),
            *(probe.context_features, probe.context_mask, probe.candidate_features, probe.candidate_mask),
        )

    def train(self) -> TrainedRanker:
        self.epoch_steps = len(self.losses.window_batches(0))
        steps = self.config.epochs * self.epoch_steps
        optimizer, schedule = adamw(self.modules, self.calibration, self.config, self.config.learning_rate, steps)
        if not self._resume():
            self.trends.fit(self.interactions, np.flatnonzero(self.losses.learned), self.ranker.trend.weight)
        elif self.stage == 1:
            self._load_optimizer(optimizer, schedule)
        # What everybody wants is known; stage 1 learns what a person wants beside it.
        self.ranker.trend.requires_grad_(False)
        if self.stage == 1:
            while self.epoch < self.config.epochs and self.stale < self.config.patience:
                self._epoch(
                    optimizer, schedule, self.losses.next_item(self.epoch), self.config.epochs, self.scorers.stage_1
                )
            self._restore_best()
            self.stage, self.epoch, self.stale = 2, 0, 0
        if self.config.slate_epochs and len(self.labels):
            self._train_slates()
        self._restore_best()
        self.modules.requires_grad_(True).eval().to("cpu")
        scale, offset = self.calibration.detach().cpu().tolist()
        return TrainedRanker(
            self.ranker,
            self.tower,
            self.config,
            self.progress,
            {} if self.best["ndcg"] is None else {"ndcg_at_10": self.best["ndcg"]},
            (scale, offset),
            self.elapsed,
        )

    def _train_slates(self) -> None:
        """Stage 2. The slates are mined once, by the retriever that stage 1 left: that is what serving will offer."""
        began = time.monotonic()
        self.modules.eval()
        if self.mined is None:
            self._tell(f"stage 2: looking for the candidates of {len(self.labels):,} labels")
            offered = Sources(
                self.scorers.wished_similarity,
                self.neighbours,
                self.trending,
                self.counts,
                self.labels.interactions.available_at,
                self.texts,
                self.wished,
            )
            self.mined = mine(self.labels, offered, self.trends.absent, self.config.seed, self.passed_over)
        candidates, log_q = self.mined
        self._tell(f"stage 2: what was known of {candidates.size:,} candidates at their labels' time")
        features = self._all_features(self.labels.label, candidates)
        resumed = self._pending is not None
        self.epoch_steps = len(self.losses.slate_batches(self.labels, 0))
        steps = self.epoch_steps * self.config.slate_epochs
        optimizer, schedule = adamw(
            self.modules,
            self.calibration,
            self.config,
            self.config.slate_learning_rate,
            steps,
            body_rate=self.config.slate_body_rate,
        )
        if self._pending is not None:
            self._load_optimizer(optimizer, schedule)
        elif len(self.validation):
            # What stage 2 is compared with is stage 1 under stage 2's own measure.
            gains = self._validation_gains(self.scorers.served)
            self.best = {"ndcg": float(gains.mean()), "state": self._state(), "gains": torch.from_numpy(gains)}
        if not resumed:
            self._stack(candidates, log_q, features)
        self.ranker.trend.requires_grad_(True)
        self.elapsed += time.monotonic() - began
        while self.epoch < self.config.slate_epochs:
            losses = self.losses.slates(self.labels, candidates, log_q, self.wished, features, self.epoch)
            self._epoch(optimizer, schedule, losses, self.config.slate_epochs, self.scorers.served)

    def _stack(self, candidates: NDArray[np.int32], log_q: NDArray[np.float32], features: SlateFeatures) -> None:
        """Weigh retriever and trend against each other on labels that stage 1 was not taught, before anything else is
        learned beside them. None of these people said what they want: a wish made up from the label would be trusted."""
        chosen = np.flatnonzero(np.isin(self.labels.label, self.held) & ~self.wished.any(1))
        chosen = chosen[np.argsort((self.labels.stop - self.labels.start)[chosen], kind="stable")]
        similarity = np.empty((len(chosen), candidates.shape[1]), np.float32)
        for begin in range(0, len(chosen), 256):
            rows = chosen[begin : begin + 256]
            logits = self.scorers.similarity(self.labels.take(rows))
            similarity[begin : begin + 256] = np.take_along_axis(logits, candidates[rows], axis=1)
        slate = candidates[chosen]
        again = slate == slate[:, :1]  # as in `Losses.slates`
        again[:, 0] = False
        with torch.no_grad():
            known = (features.candidate_features[chosen], features.candidate_mask[chosen])
            standardised = self.ranker.candidate_features.standardise(*(to_tensor(part, self.device) for part in known))
            trend = self.ranker.trend.weight[0]
            found = stack(
                torch.from_numpy(similarity),
                standardised.cpu(),
                torch.from_numpy(np.where(again, np.float32(NEVER), log_q[chosen])),
                trend.cpu(),
            )
            found = self.devices.agreed(found).to(trend)
            trend.copy_(found[1:])
        self._set_temperature(self.config.temperature / float(found[0]))

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
        torch.manual_seed(self.config.seed * 1_000_003 + self.stage * 1009 + self.epoch + self.devices.rank * 500_009)
        self.modules.train()
        total, steps = 0.0, 0
        tell = now_and_then(self._tell)
        for loss in losses:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self.devices.average_gradients([*self.modules.parameters(), self.calibration])
            # Not the calibration, whose first gradients exceed the norm: within it they would decide how far the model's is
            # cut; clipped by itself, the scale ended at 0.02 instead of 0.25 (MovieLens-100K without features).
            norm = float(nn.utils.clip_grad_norm_(self.modules.parameters(), self.config.gradient_norm))
            value = float(loss.detach())
            if not math.isfinite(value + norm):
                # Before the step: one such update and every weight is NaN, which nothing after it would tell.
                raise GateError(
                    f"stage {self.stage}, epoch {self.epoch + 1}, step {steps + 1}: the loss is {value}, its gradient's norm "
                    f"{norm}; nothing of this epoch is kept. Look for wild values in the events or features, or train with "
                    f"a lower learning rate than {optimizer.param_groups[0]['lr']:.3g}"
                )
            optimizer.step()
            schedule.step()
            total, steps = total + value, steps + 1
            tell(
                f"stage {self.stage}, epoch {self.epoch + 1} of {epochs}: step {steps:,} of about {self.epoch_steps:,}, "
                f"loss {total / steps:.3f}"
            )
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
        if self.on_progress and self.devices.first:
            self.on_progress(self.progress[-1])

    def _tell(self, message: str) -> None:
        if self.devices.first:
            self.say(message)

    # ---- features

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
            encoder.fit(to_tensor(values, self.device), to_tensor(mask, self.device))

    def _all_features(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
        """Features of every label, asked for in pieces that fit the memory of whoever computes them."""
        parts, tell = [], now_and_then(self._tell)
        for begin in range(0, len(rows), 4096):
            parts.append(self._label_features(rows[begin : begin + 4096], candidates[begin : begin + 4096]))
            tell(f"stage 2: what was known at {min(begin + 4096, len(rows)):,} of {len(rows):,} labels")
        return SlateFeatures(
            np.concatenate([part.context_features for part in parts]),
            np.concatenate([part.context_mask for part in parts]),
            np.concatenate([part.candidate_features for part in parts]),
            np.concatenate([part.candidate_mask for part in parts]),
        )

    # ---- validation, state

    def _validation_gains(self, scorer: Scorer) -> NDArray[np.float64]:
        """`(labels,)` NDCG@10 of each validation label."""
        gains = torch.from_numpy(gain(ranks(scorer, self.validation), 10))
        agreed: NDArray[np.float64] = self.devices.agreed(gains).numpy()
        return agreed

    def _keeps(self, gains: NDArray[np.float64]) -> bool:
        """Whether a validation `(labels,)` replaces the best so far.

        The newest does, unless it is worse beyond chance: a few hundred labels tell small differences badly, and the
        best of many noisy looks lies in the middle of the learning rate's schedule, where nothing is settled.
        """
        if self.best["state"] is None:
            return True
        difference = gains - self.best["gains"].numpy()
        return bool(interval(difference, self.validation.user)[1] >= 0)

    def _state(self) -> dict[str, Any]:
        state = {name: value.detach().cpu().clone() for name, value in self.modules.state_dict().items()}
        return {
            "modules": state,
            "calibration": self.calibration.detach().cpu().clone(),
            "temperature": self.ranker.shape.temperature,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.modules.load_state_dict(state["modules"])
        with torch.no_grad():
            self.calibration.copy_(state["calibration"])
        self._set_temperature(state["temperature"])

    def _set_temperature(self, temperature: float) -> None:
        """By which the ranker divides what its retriever says; the retriever itself is trained at that of `config`."""
        self.ranker.shape = replace(self.ranker.shape, temperature=temperature)

    def _restore_best(self) -> None:
        if self.best["state"] is not None:
            self._restore(self.best["state"])

    def _save(self, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
        if self.checkpoint is None or not self.devices.first:
            return
        state = {
            "position": (self.stage, self.epoch, self.stale, self.elapsed),
            "state": self._state(),
            "best": self.best,
            # Stage 2 moves the retriever that mined: another run of it would find other slates.
            "mined": None if self.mined is None else tuple(torch.from_numpy(array) for array in self.mined),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "progress": [asdict(line) for line in self.progress],
        }
        checkpoints.save(self.checkpoint, self.fingerprint, state)

    _pending: dict[str, Any] | None = None
    """A checkpoint that was read and whose optimizer is still to be restored."""

    def _resume(self) -> bool:
        saved = checkpoints.load(self.checkpoint, self.fingerprint) if self.checkpoint else None
        if saved is None:
            return False
        self.stage, self.epoch, self.stale, self.elapsed = saved["position"]
        self._restore(saved["state"])
        self.best = saved["best"]
        if saved["mined"] is not None:
            candidates, log_q = saved["mined"]
            self.mined = candidates.numpy(), log_q.numpy()
        self.progress = [Progress(**line) for line in saved["progress"]]
        self._pending = saved
        self._tell(f"going on after stage {self.stage}, epoch {self.epoch}, where it was stopped")
        return True

    def _load_optimizer(self, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
        if self._pending is not None:
            optimizer.load_state_dict(self._pending["optimizer"])
            schedule.load_state_dict(self._pending["schedule"])
            self._pending = None
