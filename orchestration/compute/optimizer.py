"""AdamW by parameter group, and its learning rate over a stage."""

from __future__ import annotations

import math

import torch
from torch import nn

from orchestration.compute.train_config import TrainConfig

SECOND_STAGE = frozenset(
    {
        "context",
        "candidate",
        "candidate_features",
        "self_bias",
        "candidate_norm",
        "correction_hidden",
        "correction",
        "trend",
    }
)
"""Parts of the ranker that stage 1 leaves as it found them."""


def adamw(
    modules: nn.ModuleDict,
    calibration: nn.Parameter,
    config: TrainConfig,
    learning_rate: float,
    steps: int,
    *,
    body_rate: float = 1.0,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with linear warm-up and a cosine down to zero; what stage 1 trained learns at `body_rate` of the rate."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in modules.named_parameters():
        new = name.split(".")[1] in SECOND_STAGE
        groups.setdefault((new, parameter.ndim > 1), []).append(parameter)
    groups.setdefault((True, False), []).append(calibration)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": learning_rate * (1.0 if new else body_rate),
                "weight_decay": config.weight_decay * matrix,
            }
            for (new, matrix), parameters in groups.items()
        ],
        betas=(0.9, 0.98),
    )
    warm = max(1, int(steps * config.warmup_rate))

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
