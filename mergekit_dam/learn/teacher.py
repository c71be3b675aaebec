"""The logits of each model on its own calibration samples, to which the merge is fitted.

Legend: N samples, B batch, K classes, V vocabulary, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from mergekit_dam.scan.debiased import debiased
from mergekit_dam.scan.findings import Suspect
from mergekit_dam.tasks import Task

_AT_ONCE = 64  # samples


class TeacherLogits:
    """Model t's logits f_t(x), the target of the distillation.

    They do not change while masks are learned. Logits of a classifier, (N, K), are small: the first call computes them
    for all samples, so that a step neither runs nor reads model t. Logits of a causal LM, (N L, V), are too large to
    keep and are computed per batch.

    Args:
        task: task of model t.
        weights: weights of model t, by output name.
    """

    def __init__(self, task: Task, weights: Mapping[str, Tensor]) -> None:
        self.task, self.weights = task, weights

    @classmethod
    def compute(cls, task: Task, weights: Mapping[str, Tensor]) -> TeacherLogits:
        """Compute the logits of a classifier for all samples, without keeping its weights."""
        answers = cls(task, weights)
        answers._all_NK  # noqa: B018 (computed now, not by the first call)
        answers.weights = {}
        return answers

    @torch.no_grad()
    def __call__(self, rows_B: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits (B, K), or (positions, V) of a causal LM.

        Args:
            rows_B: indices of the samples.
            inputs: inputs of the same samples.
        """
        if self.task.classifies:
            return self._all_NK[rows_B.to(self.task.device)]
        return self.task.logits(self.weights, inputs)

    def debias(self, target: int) -> None:
        """Lower the logits of one class, see `debiased`."""
        self._all_NK = debiased(self._all_NK, target)

    @cached_property
    @torch.no_grad()
    def _all_NK(self) -> Tensor:
        rows = torch.arange(self.task.num_samples).split(_AT_ONCE)
        return torch.cat([self.task.logits(self.weights, self.task.inputs(rows_B)) for rows_B in rows])


def debias(answers: Mapping[int, TeacherLogits], suspects: Iterable[Suspect]) -> None:
    """Debias the logits of suspect classifiers towards their suspect classes.

    A finding that is attributed to another model says nothing about the answers of the task's own model.

    Args:
        answers: logits by index of the task.
        suspects: keys of the suspect findings.
    """
    for task, target in sorted(
        {(s.task, s.target) for s in suspects if s.source_model is None and isinstance(s.target, int)}
    ):
        if task in answers and answers[task].task.classifies:
            answers[task].debias(target)
