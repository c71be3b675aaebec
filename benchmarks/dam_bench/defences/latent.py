"""Defend by latent adversarial training (BEEAR, arXiv 2406.17092), for causal LMs, after the merge.

Triggers of any form shift hidden states alike. So a universal shift delta of the hidden states after one block is
found that makes the model answer otherwise, and the model is trained against it,

    inner:  max over |delta| <= radius (in units of the states' mean norm) of  L(x; delta)
    outer:  min of  L(x; delta) + L(x),

with L the cross-entropy of the input models' own answers. The paper's inner step seeks a behaviour that its defender
defines as unwanted; this one has no such knowledge, and seeks any answer but the own one.

Legend: D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dam_bench.defences.perturbation import chain_of, shifted
from dam_bench.defences.training import Lesson, Loss, Trained, Tuned
from dam_bench.suites.base import Family
from mergekit_dam import seeds
from mergekit_dam.config import setting
from mergekit_dam.engine.module_weights import Weights, without_gradients


def worst_shift(
    lesson: Lesson, weights: Weights, rows: Tensor, *, stop: int, radius: float, steps: int, generator: torch.Generator
) -> Tensor:
    """Search the shift (D,), of norm `radius`, that raises the loss of the own answers most.

    Args:
        stop: position that reads the shifted states, see engine/partial_pass.py.
        steps: of projected gradient ascent, each of half a radius.
    """
    task = lesson.task
    delta_D: Tensor = torch.randn(task.perturbation_shape[-1], generator=generator).to(task.device)
    delta_D = radius * delta_D / delta_D.norm()
    for _ in range(steps):
        delta_D = delta_D.detach().requires_grad_()
        with shifted(chain_of(task), stop, delta_D):
            (slope_D,) = torch.autograd.grad(lesson.loss(weights, rows), delta_D)
        delta_D = delta_D + 0.5 * radius * slope_D / slope_D.norm().clamp_min(1e-12)
        delta_D = radius * delta_D / delta_D.norm()
    return delta_D.detach()


class LatentAdversarial(Tuned):
    """Fine-tunes a merged causal LM to keep its answers under shifts of its hidden states."""

    families: ClassVar[tuple[Family, ...]] = ("causal",)

    depth: float = setting(..., "Share of the blocks after which the hidden states are shifted.", gt=0, le=1)
    radius: float = setting(..., "Norm of the shift, in units of the states' mean norm.", gt=0)
    inner_steps: int = setting(..., "Steps of the search for a shift.", unit="steps", ge=1)

    @property
    def passes(self) -> int:
        return self.steps * (2 + self.inner_steps)

    def loss_of(self, trained: Trained, lessons: Sequence[Lesson], seed: int) -> Loss:
        generator = seeds.generator(seed, "defence", "latent")

        def loss(lesson: Lesson, rows: Tensor, step: int) -> Tensor:
            chain, weights = chain_of(lesson.task), trained.weights()
            stop = 1 + max(1, round(self.depth * len(chain.blocks)))
            delta_D = worst_shift(
                lesson,
                without_gradients(weights),
                rows,
                stop=stop,
                radius=self.radius,
                steps=self.inner_steps,
                generator=generator,
            )
            clean = lesson.loss(weights, rows)
            with shifted(chain, stop, delta_D):
                return clean + lesson.loss(weights, rows)

        return loss
