"""Hyper-parameters of training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Hyper-parameters; the reasons stand beside the values."""

    size: str = "small"
    seed: int = 0
    gaps: bool = True  # whether the time between events and to the request's clock is looked at
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
    held_rate: float = (
        0.05  # the newest labels, this share of them, are stage 2's alone: what it weighs is then no memory
    )
    slate_epochs: int = 1
    slate_rows: int = 20_000  # labels an epoch at most
    slate_learning_rate: float = 5e-3  # for the parts that start here; see slate_body_rate for the rest
    slate_body_rate: float = 0.05  # of it: the retriever is not to be unlearned on a tenth of its labels
    slate_weight: float = 0.5
    calibration_weight: float = 0.2
    bfloat16: bool = (
        False  # products of the body and the softmax, for processors that multiply it; weights stay float32
    )
    validate_every: int = 3  # epochs
    patience: int = 4  # validations in a row worse than the best before stage 1 ends early
    validation_rate: float = 0.05  # labels come from the newest events, this share of them: tomorrow is what counts
    validation_labels: int = 1000  # at most, at random among those; the rest is learned from
