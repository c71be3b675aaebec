"""Which calibration samples a step sees. B batch."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.tasks import Task


def calibration_batch(task: Task, config: DamConfig, step: int) -> Tensor:
    """Indices of the calibration samples of a step, shape (B,): the same for the same seed and step."""
    generator = seeds.generator(config.seed, "batch", task.name, step)
    if config.patience == 0:
        return torch.randperm(task.num_samples, generator=generator)[: config.batch_size]
    usable = torch.ones(task.num_samples, dtype=torch.bool)
    usable[held_out(task, config)] = False
    (rows,) = usable.nonzero(as_tuple=True)
    return rows[torch.randperm(len(rows), generator=generator)[: config.batch_size]]


def held_out(task: Task, config: DamConfig) -> Tensor:
    """Indices of the calibration samples, a tenth or one batch, that no step sees if `patience` is set."""
    generator = seeds.generator(config.seed, "held out", task.name)
    count = max(1, min(task.num_samples // 10, config.batch_size))
    return torch.randperm(task.num_samples, generator=generator)[:count]
