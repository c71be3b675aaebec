"""Defend by an anti-backdoor task vector in feature space (LFPM, arXiv 2606.12498) of image encoders.

The merge theta gets one more task vector, tau: theta + scale tau. It is trained so that along the whole path from theta
to theta + tau the features of perturbed images are those of the clean ones in the undefended merge,

    min over tau of  mean over a in {1/n, ..., 1} of  d(f(theta + a tau; x + delta), f(theta; x))
                                                      + d(f(theta + a tau; x), f(theta; x)),

with d the squared distance relative to the squared norm. The path and the mean of losses over it are the paper's; it
has no public code, so that delta, a universal perturbation of the pixels that moves the features most, is our choice.

Legend: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dam_bench.defences.base import DefenceInputs
from dam_bench.defences.perturbation import added, chain_of, random_start, worst
from dam_bench.defences.training import Lesson, Loss, Trained, Tuned
from dam_bench.suites.base import Family
from mergekit_dam import seeds
from mergekit_dam.config import setting
from mergekit_dam.engine.module_weights import Weights, without_gradients
from mergekit_dam.tasks import Task
from mergekit_dam.tasks.bounds import Perturb


def features(task: Task, weights: Weights, inputs: dict[str, Tensor], perturb: Perturb | None = None) -> Tensor:
    """Hidden states (B, L, D) after the last block."""
    return task.through(weights, inputs, 0, chain_of(task).end - 1, perturb=perturb)


def distance(ours_BLD: Tensor, theirs_BLD: Tensor) -> Tensor:
    """Mean squared distance over samples, relative to the squared norm of the second."""
    apart_B, size_B = (ours_BLD - theirs_BLD).square().flatten(1).sum(1), theirs_BLD.square().flatten(1).sum(1)
    return (apart_B / size_B).mean()


class FeaturePath(Tuned):
    """Adds a task vector that takes perturbed features back to the clean ones."""

    families: ClassVar[tuple[Family, ...]] = ("image",)

    eps: float = setting(..., "Largest change of a pixel or word embedding, as a share of its range.", gt=0)
    inner_steps: int = setting(..., "Steps of the search for a perturbation.", unit="steps", ge=1)
    points: int = setting(..., "Points of the path on which the loss is taken.", ge=1)
    scale: float = setting(..., "Coefficient of the anti-backdoor task vector in the result.", gt=0)

    @property
    def passes(self) -> int:
        return self.steps * (2 + self.inner_steps)

    def loss_of(self, trained: Trained, lessons: Sequence[Lesson], seed: int) -> Loss:
        generator = seeds.generator(seed, "defence", "path")

        def loss(lesson: Lesson, rows: Tensor, step: int) -> Tensor:
            task, inputs = lesson.task, lesson.task.inputs(rows)
            with torch.no_grad():
                clean_BLD = features(task, trained.start, inputs)
            now = without_gradients(trained.weights())
            delta = worst(
                lambda d: distance(features(task, now, inputs, added(task, d)), clean_BLD),
                random_start(task, generator),
                eps=self.eps,
                steps=self.inner_steps,
            )
            losses = []
            for point in range(1, self.points + 1):
                weights = trained.weights(point / self.points)
                for perturb in (added(task, delta), None):
                    losses.append(distance(features(task, weights, inputs, perturb), clean_BLD))
            return torch.stack(losses).sum() / self.points

        return loss

    def changed_weights(self, given: DefenceInputs) -> Mapping[str, Tensor]:
        return self.tuned(given).result(self.scale)
