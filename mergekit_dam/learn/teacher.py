"""The logits of each model on its own calibration samples, to which the merge is fitted.

Legend: N samples, B batch, K classes, V vocabulary, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from mergekit_dam.scan.findings import Suspect
from mergekit_dam.tasks import Task

_AT_ONCE = 64  # samples
_HALVINGS = 40  # of an interval of 20 logits: to float32's precision


class TeacherLogits:
    """Model t's logits f_t(x), the target of the distillation.

    It never changes while masks are learned. Where an answer is one row of classes, all are made once, when the first
    is asked for: (N, K) is small, and neither the pass nor, where weights are streamed, reading model t is paid for in
    every step. A causal LM's answers, (N L, V), are too large to keep and are made per batch.

    Args:
        task: of model t.
        weights: of model t, by output name.
    """

    def __init__(self, task: Task, weights: Mapping[str, Tensor]) -> None:
        self.task, self.weights = task, weights

    @classmethod
    def made(cls, task: Task, weights: Mapping[str, Tensor]) -> TeacherLogits:
        """All answers of a classifier; its weights are not kept."""
        answers = cls(task, weights)
        answers._all_NK  # noqa: B018 (now, and not when the first is asked for)
        answers.weights = {}
        return answers

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

    def debias(self, target: int) -> None:
        """Answer a class no more often than the most frequent other one (see `debiased`)."""
        self._all_NK = debiased(self._all_NK, target)

    @cached_property
    @torch.no_grad()
    def _all_NK(self) -> Tensor:
        rows = torch.arange(self.task.num_samples).split(_AT_ONCE)
        return torch.cat([self.task.logits(self.weights, self.task.inputs(rows_B)) for rows_B in rows])


def debiased(logits_NK: Tensor, target: int) -> Tensor:
    """Lower one class's logits alike, until its mean probability is no higher than that of the likeliest other class.

    A victim answers its attacker's class too often without the trigger as well, and what is fitted to its answers
    learns that. On which samples it is wrong nobody knows, but no class need be more frequent than all others. Logits
    of a class that is not more frequent stay as they are; none is lowered by more than 20.

    Args:
        logits_NK: answers to samples of the task.
        target: the class.
    """

    def lowered(by: float) -> Tensor:
        found_NK = logits_NK.clone()
        found_NK[:, target] -= by
        return found_NK

    def excess(by: float) -> float:
        mean_K = lowered(by).softmax(-1).mean(0)
        return float(mean_K[target] - torch.cat([mean_K[:target], mean_K[target + 1 :]]).max())

    if logits_NK.shape[1] < 2 or excess(0.0) <= 0.0:
        return logits_NK
    low, high = 0.0, 20.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0.0 else (low, middle)
    return lowered(high)


def debias(answers: Mapping[int, TeacherLogits], suspects: Iterable[Suspect]) -> None:
    """Debias the logits of suspect classifiers towards their suspect classes.

    A finding that is attributed to another model says nothing of the answers of the task's own.

    Args:
        answers: by index of the task.
        suspects: keys of the suspect findings.
    """
    for task, target in sorted(
        {(s.task, s.target) for s in suspects if s.source_model is None and isinstance(s.target, int)}
    ):
        if task in answers and answers[task].task.classifies:
            answers[task].debias(target)
