"""Where a training runs: one device in this process, or one of several processes that `accelerate launch` started.

Every process holds all the data and the whole model, steps through its own share of each epoch's batches and applies the
mean of everybody's gradients, so all hold the same weights after every step. A batch is then as many times larger.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Devices:
    """This process among `count`; `device` is what it computes on, `first` whether it is the one that reports and saves."""

    def __init__(self, device: str | None = None) -> None:
        """`device` defaults to CUDA where there is one; among several processes each takes its own."""
        self.count, self.rank = 1, 0
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState  # a second to import, for nothing on one device

            state = PartialState(cpu=self.device.type == "cpu")
            self.count, self.rank, self.device = state.num_processes, state.process_index, state.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batches: Sequence[T]) -> list[T]:
        """This process's part of `batches`: as many for everybody, the first ones again where they do not come out even."""
        each = -(-len(batches) // self.count)
        return [batches[(step * self.count + self.rank) % len(batches)] for step in range(each if batches else 0)]

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its mean over all processes, which must hold gradients of the same parameters."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        mean = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")  # (all components,)
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def agreed(self, tensor: Tensor) -> Tensor:
        """The first process's `tensor`: what all decide by."""
        if self.count == 1:
            return tensor
        from accelerate.utils import broadcast

        found: Any = broadcast(tensor.to(self.device), 0)
        on_cpu: Tensor = found.to("cpu")
        return on_cpu
