"""The ranker in one sitting: item tower, transformer over context, wish and history, candidates as queries.

    tokens   [context, prompt, history (left-padded, oldest first, right-aligned)]  then  candidates
    mask     context, prompt and history are causal; a candidate sees all of them and itself, never another candidate

Names and shapes of inputs and outputs are the contract in `schemas.ranker`. Letters used below:

    b  requests    h  history length    p = 2 + h  prefix length    n  candidates    d  width    a  heads    e = d / a

Sources: SASRec (Kang & McAuley 2018) for next-item prediction with a causal transformer; pre-norm blocks and
SwiGLU as in Llama (Touvron et al. 2023, Shazeer 2020); gated residuals from ReZero/LayerScale (Bachlechner et al.
2020, Touvron et al. 2021); relative position bias from T5 (Raffel et al. 2020); candidates that share one cached
prefix from HSTU's M-FALCON (Zhai et al. 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from schemas.events import KINDS
from schemas.ranker import MAX_HISTORY, SIZES, TEXT_DIM

CONTEXT, PROMPT, FIRST_EVENT = 0, 1, 2
"""Positions in the prefix."""
GAP_BUCKETS = 32
"""Powers of two of a second: the last one starts at 68 years."""
CLIP = 5.0
"""Standardised features are cut here: one wild value of a drifting feature must not move a score without limit."""
TEXT_START = 4.0
"""Scale of the first projection of texts. Vectors have length 1 whatever it is, but steps are of one size: a direction that
starts large is not lost within the first of them."""


@dataclass(frozen=True, slots=True)
class RankerShape:
    """Everything that fixes the parameters' shapes; `size` is a key of `schemas.ranker.SIZES`."""

    size: str = "small"
    context_features: int = 1
    candidate_features: int = 1
    gaps: bool = True  # False: the time between events and to the request's clock is not looked at
    temperature: float = 0.05  # vectors have length 1, so logits reach ±20: sharp enough for 10^5 items
    dropout: float = 0.2


class ItemTower(nn.Module):
    """Item vectors: v = normalise(normalise(W · whitened text) + residual); the residual is 0 for unseen items."""

    def __init__(self, text_vectors: Tensor, dim: int, has_residual: Tensor) -> None:
        """`text_vectors (items, 384) float32`; `has_residual (items,) bool`: items known well enough for an id."""
        super().__init__()
        mean, whitening = whiten(text_vectors)
        self.text: Tensor
        self.has_residual: Tensor
        # Not persistent: both follow from the catalogue, and a checkpoint should not carry a copy of it.
        self.register_buffer("text", (text_vectors - mean) @ whitening, persistent=False)  # (items, 384)
        self.register_buffer("has_residual", has_residual.float().unsqueeze(1), persistent=False)  # (items, 1)
        self.mean: Tensor
        self.whitening: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("whitening", whitening)
        self.project = nn.Linear(TEXT_DIM, dim)
        self._start_as_texts()
        self.residual = nn.Embedding(len(text_vectors), dim)
        # A new id starts as its text; what the text cannot say is learned on top.
        nn.init.normal_(self.residual.weight, std=0.02 / math.sqrt(dim))

    def _start_as_texts(self) -> None:
        """Likeness of items begins as likeness of their texts, unwhitened, in its widest directions.

        A random projection of whitened texts is likeness in what hardly varies: a few thousand steps of noise.
        """
        shrunk = self.whitening.norm(dim=0)  # (384,) by how much each direction was scaled; the widest least
        widest = torch.argsort(shrunk, stable=True)[: self.project.out_features]
        back = 1 / shrunk[widest]
        with torch.no_grad():
            self.project.weight.zero_()
            self.project.weight[torch.arange(len(widest)), widest] = (
                back * TEXT_START * math.sqrt(len(back)) / back.norm()
            )
            self.project.bias.zero_()

    def text_only(self) -> Tensor:
        """`(items, d)`: every item as if it had just arrived."""
        return functional.normalize(self.project(self.text), dim=-1)

    def residuals(self) -> Tensor:
        """`(items, d)`: the learned part, zero for items without one."""
        return self.residual.weight * self.has_residual

    def forward(self) -> tuple[Tensor, Tensor]:
        """Item vectors and text-only item vectors, each `(items, d)` of length 1."""
        text_only = self.text_only()
        return functional.normalize(text_only + self.residuals(), dim=-1), text_only

    def affine(self) -> tuple[Tensor, Tensor]:
        """`weight (d, 384)`, `bias (d,)`: whitening folded in, so that a text's vector is normalise(weight·text + bias)."""
        weight = self.project.weight @ self.whitening.T  # (d, 384) @ (384, 384)
        return weight, self.project.bias - weight @ self.mean

    def project_text(self, texts: Tensor) -> Tensor:
        """A wish or a new item in item space: `(…, 384)` to `(…, d)`."""
        weight, bias = self.affine()
        return functional.normalize(functional.linear(texts, weight, bias), dim=-1)


def whiten(vectors: Tensor, floor: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Mean `(k,)` and PCA whitening matrix `(k, k)` of `vectors (items, k)`: y = (x − mean) @ matrix.

    Sentence vectors sit in a narrow cone; whitened, distances speak (Su et al. 2021). Directions with less than
    `floor` of the mean variance are not blown up: a small catalogue leaves many of them empty.
    """
    double = vectors.double()
    mean = double.mean(0)
    centred = double - mean
    values, directions = torch.linalg.eigh(centred.T @ centred / max(len(vectors) - 1, 1))
    smallest = floor * values.mean().clamp_min(1e-12)
    scale = values.clamp_min(smallest).rsqrt()
    # Unit length on average keeps the projection's inputs at the scale its initialisation expects.
    matrix = directions * scale / math.sqrt(vectors.shape[1])
    return mean.float(), matrix.float()


class FeatureEncoder(nn.Module):
    """Features to a token: standardised by stored statistics, missing ones zero, the mask beside them."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.project = nn.Linear(2 * features, dim)

    def fit(self, values: Tensor, mask: Tensor) -> None:
        """Take mean and standard deviation of the present `values (…, features)`; `mask` of the same shape."""
        values, mask = values.reshape(-1, values.shape[-1]).double(), mask.reshape(-1, mask.shape[-1]).double()
        values = torch.where(mask > 0, values, torch.zeros_like(values))
        count = mask.sum(0).clamp_min(1)
        mean = (values * mask).sum(0) / count
        std = (((values - mean) * mask).square().sum(0) / count).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def standardise(self, values: Tensor, mask: Tensor) -> Tensor:
        """`(…, features)` twice to `(…, 2 * features)`: values and mask. What is masked may be anything, NaN too."""
        values = torch.where(mask > 0, values, torch.zeros_like(values))
        return torch.cat([((values - self.mean) / self.std).clamp(-CLIP, CLIP) * mask, mask], dim=-1)

    def forward(self, standardised: Tensor) -> Tensor:
        projected: Tensor = self.project(standardised)
        return projected


class Block(nn.Module):
    """Pre-norm attention and SwiGLU with gated residuals, for the prefix and for the candidates that query it."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        hidden = 16 * math.ceil(dim * 8 / 3 / 16)  # SwiGLU has three matrices: 8/3 costs what 4 does with two
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        # Small gates start the body near the identity, which trains deep and shallow sizes alike.
        self.attention_gate = nn.Parameter(torch.full((dim,), 0.5))
        self.mlp_gate = nn.Parameter(torch.full((dim,), 0.5))
        self.dropout = nn.Dropout(dropout)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(b, l, d)` to query, key, value, each `(b, a, l, e)`."""
        b, length, d = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(b, length, 3, self.heads, d // self.heads)  # (b, l, 3, a, e)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 × (b, a, l, e)
        return query * (d // self.heads) ** -0.5, key, value

    def _merge(self, x: Tensor) -> Tensor:
        """`(b, a, l, e)` to `(b, l, d)`."""
        b, a, length, e = x.shape
        return x.transpose(1, 2).reshape(b, length, a * e)

    def _feed(self, x: Tensor, attended: Tensor) -> Tensor:
        """Both residual branches over `(b, l, d)`."""
        x = x + self.attention_gate * self.dropout(self.out(self._merge(attended)))
        gate, value = self.up(self.mlp_norm(x)).chunk(2, dim=-1)  # 2 × (b, l, hidden)
        fed: Tensor = x + self.mlp_gate * self.dropout(self.down(functional.silu(gate) * value))
        return fed

    def forward(
        self, prefix: Tensor, candidates: Tensor | None, prefix_bias: Tensor, candidate_bias: Tensor, self_bias: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """`prefix (b, p, d)`, `candidates (b, n, d)`; biases `(b, a, p, p)`, `(b, a, 1, p)` and `(a, 1, 1)`."""
        query, key, value = self._split(prefix)
        weights = torch.softmax(query @ key.transpose(-1, -2) + prefix_bias, dim=-1)  # (b, a, p, p)
        prefix = self._feed(prefix, weights @ value)
        if candidates is None:
            return prefix, None
        own_query, own_key, own_value = self._split(candidates)
        seen = own_query @ key.transpose(-1, -2) + candidate_bias  # (b, a, n, p)
        own = (own_query * own_key).sum(-1, keepdim=True) + self_bias  # (b, a, n, 1)
        weights = torch.softmax(torch.cat([seen, own], dim=-1), dim=-1)  # (b, a, n, p + 1)
        # The last column is the candidate itself; narrow() keeps the length out of the exported graph.
        attended = weights[..., :-1] @ value + weights[..., -1:] * own_value  # (b, a, n, e)
        return prefix, self._feed(candidates, attended)


class PositionBias(nn.Module):
    """How far back a token lies, per head: exact for the last 16 events, then in growing buckets.

    Recency is counted from the query, not from the window's end: a position in the middle of a training window then
    looks exactly like the end of a shorter history at serving time.
    """

    EXACT, BUCKETS = 16, 32

    def __init__(self, heads: int) -> None:
        super().__init__()
        distance = torch.arange(MAX_HISTORY + 1).double()
        growth = (distance / self.EXACT).clamp_min(1).log() / math.log((MAX_HISTORY + 1) / self.EXACT)
        bucket = torch.where(distance < self.EXACT, distance, self.EXACT + growth * (self.BUCKETS - self.EXACT))
        self.bucket: Tensor
        self.register_buffer("bucket", bucket.long().clamp_max(self.BUCKETS - 1), persistent=False)
        # Two more rows: the context and the prompt token have no age.
        self.bias = nn.Embedding(self.BUCKETS + FIRST_EVENT, heads)
        nn.init.zeros_(self.bias.weight)

    def forward(self, length: Tensor) -> tuple[Tensor, Tensor]:
        """For positions `length (p,)`: biases `(a, p, p)` between them and `(a, 1, p)` from a candidate after them."""
        age = torch.cat([length, length[-1:] + 1]).unsqueeze(1) - length.unsqueeze(0)  # (p + 1, p)
        row = self.bucket[age.clamp(0, MAX_HISTORY)]
        row = torch.where(length < FIRST_EVENT, self.BUCKETS + length, row)
        bias = self.bias(row).permute(2, 0, 1)  # (a, p + 1, p)
        return bias[:, :-1], bias[:, -1:]


class Ranker(nn.Module):
    """Maps the contract's inputs to `user_vector (b, d)` and `scores (b, n)`; knows vectors, not ids."""

    def __init__(self, shape: RankerShape) -> None:
        super().__init__()
        size = SIZES[shape.size]
        d = size.dim
        self.shape = shape
        self.context = FeatureEncoder(shape.context_features, d)
        self.no_context = nn.Parameter(torch.zeros(d))
        self.prompt = nn.Linear(d, d)
        self.no_prompt = nn.Parameter(torch.zeros(d))
        self.event = nn.Linear(d, d)
        self.kind = nn.Embedding(len(KINDS) + 1, d, padding_idx=0)
        self.gap = nn.Embedding(GAP_BUCKETS, d)
        self.value_stats: Tensor
        self.register_buffer("value_stats", torch.tensor([0.0, 1.0]))  # mean and standard deviation
        self.value = nn.Linear(2, d, bias=False)
        self.gap_edges: Tensor
        self.register_buffer("gap_edges", 2.0 ** torch.arange(GAP_BUCKETS - 1), persistent=False)
        self.candidate = nn.Linear(d, d)
        self.candidate_features = FeatureEncoder(shape.candidate_features, d)
        self.position = PositionBias(size.heads)
        self.self_bias = nn.Parameter(torch.zeros(size.heads, 1, 1))
        self.blocks = nn.ModuleList(Block(d, size.heads, shape.dropout) for _ in range(size.layers))
        self.norm = nn.LayerNorm(d)
        self.user = nn.Linear(d, d)
        self.candidate_norm = nn.LayerNorm(d)
        self.trend = nn.Linear(2 * shape.candidate_features, 1, bias=False)
        self.correction_hidden = nn.Linear(d + 2 * shape.candidate_features, d)
        self.correction = nn.Linear(d, 1)
        self.dropout = nn.Dropout(shape.dropout)
        for table in (self.kind, self.gap):
            nn.init.normal_(table.weight, std=0.1)
        # The retriever starts with what lies near a person's events. From a random start its gradient is noise until it
        # has found that by chance: on events with much of that it stood still for six epochs of ten.
        for layer in (self.event, self.user):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        # Zero: the ranker starts equal to its own retriever and can only learn to be better. Features start silent for
        # the same reason: the first stage never sees them.
        for encoder in (self.context, self.candidate_features):
            nn.init.zeros_(encoder.project.weight)
            nn.init.zeros_(encoder.project.bias)
        nn.init.zeros_(self.trend.weight)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    def fit_values(self, values: Tensor) -> None:
        """Standardise event values by those of `values (n,)` that are finite; NaN is none."""
        present = values[values.isfinite()].double()
        if len(present):
            std = present.std(correction=0)
            self.value_stats.copy_(torch.stack([present.mean(), torch.where(std > 1e-6, std, torch.ones_like(std))]))

    def event_tokens(self, vectors: Tensor, kinds: Tensor, values: Tensor, gaps: Tensor) -> Tensor:
        """`(b, h, d)`: item + kind + value + time to the next event, if the shape has that."""
        scaled = vectors * math.sqrt(vectors.shape[-1])  # unit vectors have tiny components; tokens are of order one
        # Counting passed edges, not a logarithm: two runtimes must never disagree about a bucket.
        if not self.shape.gaps:
            gaps = gaps * 0.0  # still an input of the exported graph, whose contract is one for both
        bucket = (gaps.unsqueeze(-1) >= self.gap_edges).long().sum(-1)  # (b, h)
        present = (values != 0).to(values.dtype)
        value = ((values - self.value_stats[0]) / self.value_stats[1]).clamp(-CLIP, CLIP) * present
        tokens: Tensor = self.event(scaled) + self.kind(kinds) + self.gap(bucket)
        valued: Tensor = tokens + self.value(torch.stack([value, present], dim=-1))
        return valued

    def prefix(
        self,
        context_features: Tensor,
        context_mask: Tensor,
        prompt_vector: Tensor,
        prompt_mask: Tensor,
        history_vectors: Tensor,
        history_kinds: Tensor,
        history_values: Tensor,
        history_gaps: Tensor,
    ) -> Tensor:
        """The tokens `(b, p, d)` before the first block."""
        has_context = context_mask.amax(-1, keepdim=True)  # (b, 1): a context without one known feature is none
        known = self.context(self.context.standardise(context_features, context_mask))
        context = self.no_context + has_context * known
        has_prompt = prompt_mask.unsqueeze(-1)  # (b, 1)
        prompt = self.prompt(prompt_vector * math.sqrt(prompt_vector.shape[-1]))
        prompt = has_prompt * prompt + (1 - has_prompt) * self.no_prompt
        events = self.event_tokens(history_vectors, history_kinds, history_values, history_gaps)
        tokens = torch.cat([context.unsqueeze(1), prompt.unsqueeze(1), events], dim=1)  # (b, 2 + h, d)
        dropped: Tensor = self.dropout(tokens)
        return dropped

    def biases(self, history_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to attention logits: `(b, a, p, p)` inside the prefix, `(b, a, 1, p)` from a candidate."""
        ones = torch.ones_like(history_mask[:, :1])
        visible = torch.cat([ones, ones, history_mask], dim=1)  # (b, p)
        # cumsum instead of arange(shape): the length stays a dynamic dimension of the exported graph.
        position = torch.ones_like(visible[0]).cumsum(0).long() - 1  # (p,)
        inside, after = self.position(position)  # (a, p, p), (a, 1, p)
        causal = (position.unsqueeze(1) < position.unsqueeze(0)).to(visible.dtype)  # (p, p): 1 where it is the future
        hidden = (1 - visible)[:, None, None, :]  # (b, 1, 1, p)
        # -1e4, not -inf: stays finite in half precision, and exp(-1e4) is zero all the same.
        return inside - 1e4 * torch.maximum(hidden, causal), after - 1e4 * hidden

    def encode(
        self, tokens: Tensor, candidates: Tensor | None, biases: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The blocks: prefix states `(b, p, d)` and candidate states `(b, n, d)`."""
        for block in self.blocks:
            tokens, candidates = block(tokens, candidates, *biases, self.self_bias)
        return tokens, candidates

    def user_vectors(self, states: Tensor) -> Tensor:
        """States `(…, d)` in item space, length 1."""
        projected: Tensor = self.user(self.norm(states))
        return functional.normalize(projected, dim=-1)

    def forward(
        self,
        context_features: Tensor,
        context_mask: Tensor,
        prompt_vector: Tensor,
        prompt_mask: Tensor,
        history_vectors: Tensor,
        history_kinds: Tensor,
        history_values: Tensor,
        history_gaps: Tensor,
        history_mask: Tensor,
        candidate_vectors: Tensor,
        candidate_features: Tensor,
        candidate_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`user_vector (b, d)` and `scores (b, n)`; inputs as in `schemas.ranker`."""
        tokens = self.prefix(
            context_features,
            context_mask,
            prompt_vector,
            prompt_mask,
            history_vectors,
            history_kinds,
            history_values,
            history_gaps,
        )
        standardised = self.candidate_features.standardise(candidate_features, candidate_mask)  # (b, n, 2g)
        candidates = self.candidate(candidate_vectors * math.sqrt(candidate_vectors.shape[-1]))
        candidates = self.dropout(candidates + self.candidate_features(standardised))
        states, candidates = self.encode(tokens, candidates, self.biases(history_mask))
        # Right-aligned: the newest event is always last. Without history the prompt's state speaks.
        has_history = history_mask[:, -1:]  # (b, 1)
        user = self.user_vectors(has_history * states[:, -1] + (1 - has_history) * states[:, PROMPT])  # (b, d)
        hidden = functional.silu(
            self.correction_hidden(torch.cat([self.candidate_norm(candidates), standardised], dim=-1))
        )
        correction = (self.trend(standardised) + self.correction(hidden)).squeeze(-1)  # (b, n)
        retrieval = (candidate_vectors @ user.unsqueeze(-1)).squeeze(-1)  # (b, n, d) @ (b, d, 1)
        return user, retrieval / self.shape.temperature + correction
