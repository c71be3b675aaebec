"""What a model answers to its own calibration samples.

Legend: N samples, B batch, K classes, V vocabulary, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from mergekit_dam.tasks import Task

_AT_ONCE = 64  # samples


class OwnAnswers:
    """f_t(x), the target of the distillation.

    It never changes while masks are learned. Where an answer is one row of classes, all are made once, when the first
    is asked for: (N, K) is small, and neither the pass nor, where weights are streamed, reading model t is paid for in
    every step. A causal LM's answers, (N L, V), are too large to keep and are made per batch.

    Args:
        task: of model t.
        weights: of model t, by output name.
    """

    def __init__(self, task: Task, weights: Mapping[str, Tensor]) -> None:
        self.task, self.weights = task, weights

    @torch.no_grad()
    def __call__(self, rows_B: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """logits (B, K), or (positions, V) of a causal LM.

        Args:
            rows_B: indices of the samples.
            inputs: the same samples, as the task makes them.
        """
        if self.task.classifies:
            return self._all_NK[rows_B.to(self.task.device)]
        return self.task.logits(self.weights, inputs)

    @cached_property
    def _all_NK(self) -> Tensor:
        rows = torch.arange(self.task.num_samples).split(_AT_ONCE)
        return torch.cat([self.task.logits(self.weights, self.task.inputs(rows_B)) for rows_B in rows])
