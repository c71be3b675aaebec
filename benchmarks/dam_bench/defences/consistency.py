"""Defend by consistency of layers (CROW, ICML 2025), for causal LMs, after the merge.

A trigger makes hidden states jump between layers. With h_1, ..., h_n the hidden states that the blocks and the final
norm read,

    consistency = mean over tokens and l of  1 - cos(h_l, h_(l+1))
    delta = eps sign(gradient of the consistency loss with respect to the word embeddings)
    min of  L(x) + alpha consistency(x + delta)

over all layers. L is the cross-entropy of the input models' own answers. The paper trains LoRAs, as we do by default.

Legend: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dam_bench.defences.perturbation import chain_of
from dam_bench.defences.training import Lesson, Loss, Trained, Tuned
from dam_bench.suites.base import Family
from mergekit_dam.config import setting
from mergekit_dam.engine.module_weights import Weights, without_gradients
from mergekit_dam.tasks import Task


def inconsistency(task: Task, weights: Weights, inputs: dict[str, Tensor], delta_BLD: Tensor | float = 0.0) -> Tensor:
    """Mean of 1 - cos between the hidden states of consecutive layers, over layers and tokens of the texts.

    Args:
        delta_BLD: is added to the word embeddings.
    """
    chain, mask_BL = chain_of(task), inputs["attention_mask"].float()
    with chain.observed(range(1, chain.end)) as states:
        task.logits(weights, inputs, lambda x, mask: (x + delta_BLD, mask))
    layers = [states[position] for position in sorted(states)]
    jumps = [1 - F.cosine_similarity(a.float(), b.float(), dim=-1) for a, b in pairwise(layers)]
    return torch.stack([(jump_BL * mask_BL).sum() / mask_BL.sum() for jump_BL in jumps]).mean()


def against_consistency(task: Task, weights: Weights, inputs: dict[str, Tensor], eps: float) -> Tensor:
    """The perturbation (B, L, D) of the word embeddings by one step along the sign of the gradient (FGSM)."""
    batch, length = inputs["input_ids"].shape
    delta = torch.zeros(batch, length, task.perturbation_shape[-1], device=task.device, requires_grad=True)
    (slope,) = torch.autograd.grad(inconsistency(task, without_gradients(weights), inputs, delta), delta)
    return eps * slope.sign()


class Consistency(Tuned):
    """Fine-tunes a merged causal LM to pass hidden states smoothly from layer to layer."""

    families: ClassVar[tuple[Family, ...]] = ("causal",)

    eps: float = setting(..., "Change of each entry of the word embeddings.", gt=0)
    alpha: float = setting(..., "Weight of the consistency loss.", ge=0)

    def loss_of(self, trained: Trained, lessons: Sequence[Lesson], seed: int) -> Loss:
        def loss(lesson: Lesson, rows: Tensor, step: int) -> Tensor:
            weights, inputs = trained.weights(), lesson.task.inputs(rows)
            delta_BLD = against_consistency(lesson.task, weights, inputs, self.eps)
            return lesson.loss(weights, rows) + self.alpha * inconsistency(lesson.task, weights, inputs, delta_BLD)

        return loss
