"""The ranker's contract: names and shapes of its graph, limits, sizes.

    name                 shape      dtype     meaning
    context_features     (b, f)     float32   encoded profile and activity features of the person
    context_mask         (b, f)     float32   1 where the feature is present
    prompt_vector        (b, d)     float32   the wish in item space; zeros without one
    prompt_mask          (b,)       float32   1 with a wish
    history_vectors      (b, h, d)  float32   item vectors, oldest first, right-aligned; zeros pad
    history_kinds        (b, h)     int64     index in KINDS + 1; 0 pads
    history_values       (b, h)     float32   the event's value; 0 where it has none, ZERO_VALUE where it is 0
    history_gaps         (b, h)     float32   seconds to the next event; the last one's to the request
    history_mask         (b, h)     float32   1 for an event, 0 for padding
    candidate_vectors    (b, n, d)  float32   item vectors of the candidates
    candidate_features   (b, n, g)  float32   encoded item and cross features
    candidate_mask       (b, n, g)  float32   1 where the feature is present
    ------------------------------------------------------------------------------------
    user_vector          (b, d)     float32   normalised; the ANN query in item space
    scores               (b, n)     float32   logits; higher is better

h and n are at least 1: without history one padded event is fed, without candidates one zero vector.
"""

from __future__ import annotations

from dataclasses import dataclass

INPUTS: tuple[str, ...] = (
    "context_features",
    "context_mask",
    "prompt_vector",
    "prompt_mask",
    "history_vectors",
    "history_kinds",
    "history_values",
    "history_gaps",
    "history_mask",
    "candidate_vectors",
    "candidate_features",
    "candidate_mask",
)
CANDIDATE_INPUTS = tuple(name for name in INPUTS if name.startswith("candidate_"))
PERSON_INPUTS = tuple(name for name in INPUTS if name not in CANDIDATE_INPUTS)
OUTPUTS: tuple[str, ...] = ("user_vector", "scores")

MAX_HISTORY = 200
MAX_CANDIDATES = 1000
TEXT_DIM = 384
"""Dimension of the text encoder's vectors."""


ZERO_VALUE = 1e-6
"""How a value of 0 enters the graph, where 0 means that there is none; half precision tells it from 0, too."""


@dataclass(frozen=True, slots=True)
class RankerSize:
    """Width `dim` (also the item vector's), `layers`, attention `heads`."""

    dim: int
    layers: int
    heads: int


SIZES: dict[str, RankerSize] = {
    "small": RankerSize(dim=64, layers=2, heads=2),
    "standard": RankerSize(dim=128, layers=2, heads=4),
    "large": RankerSize(dim=256, layers=4, heads=8),
}
