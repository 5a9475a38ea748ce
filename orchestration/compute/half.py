"""The ranker for a GPU: sub-layers in half precision, the residual stream and everything around the blocks in float.

Half precision all the way would move scores by 0.2 % of their spread; with the sums between sub-layers in float it is a
few hundredths of a per cent, for the same matrix products. Gaps of years and logits of ±20 stay out of half's reach.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional

from orchestration.compute.model import Block, Ranker


class HalfBlock(Block):
    """A `Block` whose products run in half precision; inputs and outputs are float."""

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, length, d = x.shape
        qkv = self.qkv(self.attention_norm(x).half()).view(b, length, 3, self.heads, d // self.heads)  # (b, l, 3, a, e)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 × (b, a, l, e)
        return query * (d // self.heads) ** -0.5, key, value

    def _feed(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attention_gate * self.out(self._merge(attended)).float()
        gate, value = self.up(self.mlp_norm(x).half()).chunk(2, dim=-1)  # 2 × (b, l, hidden)
        fed: Tensor = x + self.mlp_gate * self.down(functional.silu(gate) * value).float()
        return fed


class HalfRanker(Ranker):
    """A `Ranker` with `HalfBlock`s, for inference alone; the same inputs and outputs."""

    def encode(
        self, tokens: Tensor, candidates: Tensor | None, biases: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        inside, after = (bias.half() for bias in biases)
        for block in self.blocks:
            tokens, candidates = block(tokens, candidates, inside, after, self.self_bias.half())
        return tokens, candidates


def half(ranker: Ranker) -> HalfRanker:
    """A copy of `ranker` in evaluation mode that multiplies in half precision inside its blocks."""
    made = HalfRanker(ranker.shape)
    made.load_state_dict(copy.deepcopy(ranker.state_dict()))
    for block in made.blocks:
        assert isinstance(block, Block)
        block.__class__ = HalfBlock
        for linear in (block.qkv, block.out, block.up, block.down):
            linear.to(torch.float16)
    return made.eval()
