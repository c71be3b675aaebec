"""Defend by shared adversarial unlearning (SAU) of classifiers.

Perturbed samples that the undefended and the defended model both get wrong, and in the same way, are where a backdoor
can hide. Per sample, with p_0 and p the answers of the undefended and the defended merge and y the own answer,

    inner:  max over |delta| <= eps of  -log p_y(x + delta) - share JS(p_0(x + delta), p(x + delta))
    outer:  min of  L(x, y) + weight * mean over {argmax p_0(x + delta) = c != y} of  -log(1 - p_c(x + delta))

Legend: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dam_bench.defences.perturbation import added, random_start, worst
from dam_bench.defences.training import Lesson, Loss, Trained, Tuned
from dam_bench.suites.base import Family
from mergekit_dam import seeds
from mergekit_dam.config import setting
from mergekit_dam.engine.module_weights import without_gradients


def jensen_shannon(p_BK: Tensor, q_BK: Tensor) -> Tensor:
    """Jensen-Shannon divergence per row (B,), in nats."""
    middle = ((p_BK + q_BK) / 2).clamp_min(1e-12).log()
    each = [(one * (one.clamp_min(1e-12).log() - middle)).sum(-1) for one in (p_BK, q_BK)]
    return (each[0] + each[1]) / 2


class SharedUnlearning(Tuned):
    """Unlearns adversarial samples that the merge shares with what it becomes."""

    families: ClassVar[tuple[Family, ...]] = ("image", "text")

    eps: float = setting(..., "Largest change of a pixel or word embedding, as a share of its range.", gt=0)
    inner_steps: int = setting(..., "Steps of the search for a perturbation.", unit="steps", ge=1)
    share: float = setting(..., "Weight of the divergence of both models' answers in the search.", ge=0)
    weight: float = setting(..., "Weight of the unlearning of shared adversarial samples.", ge=0)

    @property
    def passes(self) -> int:
        return self.steps * (2 + self.inner_steps)

    def loss_of(self, trained: Trained, lessons: Sequence[Lesson], seed: int) -> Loss:
        generator = seeds.generator(seed, "defence", "unlearning")

        def loss(lesson: Lesson, rows: Tensor, step: int) -> Tensor:
            task, weights, inputs = lesson.task, trained.weights(), lesson.task.inputs(rows)
            fixed = without_gradients(weights)
            own_B = torch.tensor(lesson.targets(rows), device=task.device)

            def shared_error(delta: Tensor) -> Tensor:
                perturb = added(task, delta)
                now_BK = task.logits(fixed, inputs, perturb)
                apart_B = jensen_shannon(task.logits(trained.start, inputs, perturb).softmax(-1), now_BK.softmax(-1))
                return F.cross_entropy(now_BK, own_B, reduction="sum") - self.share * apart_B.sum()

            begun = random_start(task, generator, samples=len(rows))
            perturb = added(task, worst(shared_error, begun, eps=self.eps, steps=self.inner_steps))
            with torch.no_grad():
                before_B = task.logits(trained.start, inputs, perturb).argmax(-1)
            clean = F.cross_entropy(task.logits(weights, inputs), own_B)
            p_B = task.logits(weights, inputs, perturb).softmax(-1).gather(1, before_B[:, None])[:, 0]
            unlearned_B = -torch.log1p(-p_B.clamp(max=1 - 1e-6))
            wrong_B = (before_B != own_B).float()
            return clean + self.weight * (unlearned_B * wrong_B).sum() / wrong_B.sum().clamp_min(1.0)

        return loss
