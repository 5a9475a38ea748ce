"""The ranker as the CPU runs it: the same function, with its sums in an order that padding and company cannot change.

A sum of floats depends on its order. Softmax adds along the keys in groups as wide as the processor's vectors, so a
padded history groups them anew: scores then move in the seventh digit, and where that tips the rounding of a quantised
activation, by a whole step in everything behind it. Here the sum over the keys is one more column of the product with
the values: matrix products add key by key, and hidden keys, whose weight is an exact zero, change nothing.

What is constant is folded into weights; prefix and candidates share one product with each weight; and behind the last
block only those states of the prefix are made that may become the user vector. Letters as in `orchestration.compute.model`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestration.compute.model import PROMPT, Block, Ranker


class FoldedBlock(nn.Module):
    """A `Block` in evaluation mode: no gate, no scale of the query, and no product that has to be cut into parts.

    A value has one more column than a head is wide, `e + 1`: it is always one, so that the product with the weights holds
    their sum beside the weighted values. Behind the division it is one again, and `out` has zeros for it.
    """

    def __init__(self, block: Block, *, last: bool) -> None:
        super().__init__()
        self.heads, self.last = block.heads, last
        self.attention_norm, self.mlp_norm = block.attention_norm, block.mlp_norm
        d = block.out.in_features
        e = d // self.heads
        with torch.no_grad():
            query, key, value = block.qkv.weight.chunk(3)  # 3 × (d, d)
            gate, fed = block.up.weight.chunk(2)  # 2 × (hidden, d)
            out = block.attention_gate.unsqueeze(1) * block.out.weight  # (d, d)
            self.query, self.key, self.value = _linear(query * e**-0.5), _linear(key), _linear(value)
            self.out = _linear(functional.pad(out.view(d, self.heads, e), (0, 1)).flatten(1))  # from (a * (e + 1)) to d
            self.gate, self.up = _linear(gate), _linear(fed)
            self.down = _linear(block.mlp_gate.unsqueeze(1) * block.down.weight)

    def _heads(self, x: Tensor) -> Tensor:
        """`(b, l, d)` to `(b, a, l, e)`."""
        b, length, d = x.shape
        return x.view(b, length, self.heads, d // self.heads).transpose(1, 2)

    def _values(self, x: Tensor) -> Tensor:
        """Values `(b, a, l, e + 1)` of normed rows `(b, l, d)`."""
        return functional.pad(self._heads(self.value(x)), (0, 1), value=1.0)

    def _finish(self, rows: Tensor, summed: Tensor) -> Tensor:
        """`rows (b, l, d)` behind both branches; `summed (b, a, l, e + 1)` is what attention added up."""
        attended = (summed / summed[..., -1:]).transpose(1, 2).flatten(2)  # (b, l, a * (e + 1))
        rows = rows + self.out(attended)
        normed = self.mlp_norm(rows)
        moved: Tensor = rows + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return moved

    def forward(
        self, prefix: Tensor, candidates: Tensor, prefix_bias: Tensor, candidate_bias: Tensor, self_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Block.forward`; the last block takes a `prefix_bias (b, a, 2, p)` and gives two states of the prefix,
        `(b, 2, d)`: the wish's and the newest event's.
        """
        normed = self.attention_norm(prefix)
        key = self._heads(self.key(normed)).transpose(-1, -2)  # (b, a, e, p)
        value = self._values(normed)  # (b, a, p, e + 1)
        if self.last:
            prefix, normed = _last_two(prefix), _last_two(normed)  # (b, 2, d)
        seen = self._heads(self.query(normed)) @ key + prefix_bias  # (b, a, p, p)
        prefix = self._finish(prefix, torch.exp(seen - seen.amax(-1, keepdim=True)) @ value)
        normed = self.attention_norm(candidates)
        query = self._heads(self.query(normed))  # (b, a, n, e)
        seen = query @ key + candidate_bias  # (b, a, n, p)
        own = (query * self._heads(self.key(normed))).sum(-1, keepdim=True) + self_bias  # (b, a, n, 1)
        highest = torch.maximum(seen.amax(-1, keepdim=True), own)
        summed = torch.exp(seen - highest) @ value + torch.exp(own - highest) * self._values(normed)
        return prefix, self._finish(candidates, summed)


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.detach().clone())
    return made


def _last_two(prefix: Tensor) -> Tensor:
    """Of `(b, p, …)` the wish and the newest event, or padding where there is none: `(b, 2, …)`."""
    return torch.cat([prefix[:, PROMPT : PROMPT + 1], prefix[:, -1:]], dim=1)


class FoldedRanker(Ranker):
    """A `Ranker` of `FoldedBlock`s, for inference alone; the same inputs and outputs."""

    def encode(
        self, tokens: Tensor, candidates: Tensor | None, biases: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """As `Ranker.encode`, but of the prefix only what `Ranker.forward` reads: the states at PROMPT and at the end."""
        assert candidates is not None, "a folded ranker always has candidates"
        inside, after = biases
        for block in self.blocks:
            assert isinstance(block, FoldedBlock)
            seen = _last_two(inside.transpose(1, 2)).transpose(1, 2) if block.last else inside
            tokens, candidates = block(tokens, candidates, seen, after, self.self_bias)
        return torch.cat([tokens[:, :1], tokens], dim=1), candidates  # (b, 3, d): PROMPT is 1, the end is -1


def fold(ranker: Ranker) -> FoldedRanker:
    """A copy of `ranker` in evaluation mode whose blocks are folded; `ranker` stays as it is."""
    folded = FoldedRanker(ranker.shape)
    folded.load_state_dict(copy.deepcopy(ranker.state_dict()))
    blocks = list(folded.blocks)
    folded.blocks = nn.ModuleList(
        FoldedBlock(block, last=block is blocks[-1]) for block in blocks if isinstance(block, Block)
    )
    return folded.eval()
