"""Defend by adversarial weight masking (AWM): soft masks that keep answers under a universal perturbation.

    min over m in [0, 1] of  (1 - beta) L(m theta; x) + beta max over |delta| <= eps of L(m theta; x + delta)
                             + gamma mean(m)

AWM recovers a universal trigger by the inner maximum and shrinks the weights that serve it. L is the cross-entropy of
the input models' own answers, which need no label.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dam_bench.defences.base import DefenceInputs
from dam_bench.defences.perturbation import added, random_start, worst
from dam_bench.defences.training import Lesson, Loss, Trained, Tuned
from mergekit_dam import seeds
from mergekit_dam.config import setting
from mergekit_dam.engine.module_weights import without_gradients


class MaskedWeights(Trained):
    """Soft masks in [0, 1] on matrices, one entry per weight; they begin at 1.

    Args:
        start: the merge's tensors by output name, float32.
        names: of those that may be masked; of them, matrices are.
    """

    def __init__(self, start: dict[str, Tensor], names: Iterable[str]) -> None:
        self.start = start
        self.masks = {n: nn.Parameter(torch.ones_like(start[n])) for n in sorted(names) if start[n].ndim == 2}
        self.parameters = list(self.masks.values())

    def weights(self, scale: float = 1.0) -> dict[str, Tensor]:
        return {**self.start, **{n: self.start[n] * (1 + scale * (m - 1)) for n, m in self.masks.items()}}

    @torch.no_grad()
    def project(self) -> None:
        for mask in self.parameters:
            mask.clamp_(0.0, 1.0)


class WeightMasking(Tuned):
    """Learns soft masks on the merge's matrices."""

    lora_rank: Literal[0] = setting(0, "Masks are trained, no weights.")
    eps: float = setting(..., "Largest change of a pixel or word embedding, as a share of its range.", gt=0)
    inner_steps: int = setting(..., "Steps of the search for a perturbation.", unit="steps", ge=1)
    beta: float = setting(..., "Weight of the loss under perturbations, against that of clean inputs.", ge=0, le=1)
    gamma: float = setting(..., "Weight of the mean of the masks.", ge=0)

    def trainable(self, given: DefenceInputs) -> Trained:
        return MaskedWeights(given.start_weights(), set.union(*(set(task.body) for task in given.tasks)))

    @property
    def passes(self) -> int:
        return self.steps * (2 + self.inner_steps)

    def loss_of(self, trained: Trained, lessons: Sequence[Lesson], seed: int) -> Loss:
        generator = seeds.generator(seed, "defence", "masking")
        size = sum(mask.numel() for mask in trained.parameters)

        def loss(lesson: Lesson, rows: Tensor, step: int) -> Tensor:
            task, weights = lesson.task, trained.weights()
            fixed = without_gradients(weights)
            delta = worst(
                lambda d: lesson.loss(fixed, rows, added(task, d)),
                random_start(task, generator),
                eps=self.eps,
                steps=self.inner_steps,
            )
            clean, attacked = lesson.loss(weights, rows), lesson.loss(weights, rows, added(task, delta))
            kept = torch.stack([mask.abs().sum() for mask in trained.parameters]).sum() / size
            return (1 - self.beta) * clean + self.beta * attacked + self.gamma * kept

        return loss
