"""Concrete (Gumbel-sigmoid) masks over the task vectors (arXiv 1611.00712), one logit per masked unit.

Two of them, Task-Shared (M1) and Backdoor-Detection (M2), make the mask M = M1 o M2 of the merge equation
(DAM, arXiv 2410.13910). Keys are checkpoint tensor names. `density` is the kept fraction, the mean of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from mergekit_dam.distributed.shards import ALONE, Shards
from mergekit_dam.seeds import generator

Granularity = Literal["element", "row", "tensor"]
TASK_SHARED, BACKDOOR_DETECTION = "task_shared", "backdoor_detection"
_SMALLEST = 1e-6  # keeps the noise finite and the mean of a mask away from zero


def mask_shape(shape: torch.Size | tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Shape of a mask that broadcasts to a tensor of `shape`: all, one entry per row (dim 0), or one."""
    if granularity == "element":
        return tuple(shape)
    if granularity == "row" and len(shape) > 0:
        return (shape[0], *[1] * (len(shape) - 1))
    return (1,) * len(shape)


class ConcreteMask:
    """Mask logits for a set of tensors.

    Args:
        shapes: tensor name -> shape of the mask.
        name: `task_shared` or `backdoor_detection`; it seeds the noise, too.
        temperature: of the relaxation; lower is closer to 0/1.
        rescale: divide each tensor's mask by its mean, so that its density does not scale the task vector.
        initial_logit: start of all logits.
        device: where logits live.
        shards: processes that hold the masks' rows; ALONE for masks that every process holds whole.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], *, name: str, temperature: float, rescale: bool,
        initial_logit: float, device: torch.device, shards: Shards = ALONE,
    ) -> None:  # fmt: skip
        self.name, self.temperature, self.rescale, self.shards = name, temperature, rescale, shards
        self.shapes = dict(shapes)
        self.logits = {
            key: torch.full(shards.local_shape(shape), initial_logit, dtype=torch.float32, device=device)
            for key, shape in shapes.items()
        }

    def sample(self, key: str, *, seed: int, step: int) -> Tensor:
        """One relaxed sample in (0, 1) of the mask of a tensor: sigmoid((logit + logistic noise) / temperature).

        The noise depends on (seed, step, mask, tensor) alone, not on the order of calls.
        """
        logits = self.logits[key]
        source = generator(self.name, key, seed, step)
        u = torch.rand(self.shapes[key], generator=source).clamp_(_SMALLEST, 1 - _SMALLEST)
        noise = torch.logit(self.shards.local(u)).to(logits.device)
        return noise.add_(logits).div_(self.temperature).sigmoid_()

    def expectation(self, key: str) -> Tensor:
        """Probability that a unit is kept, sigmoid(logit): the mask that is saved, not one random sample."""
        return torch.sigmoid(self.logits[key])

    def factor(self, key: str, sample: Tensor) -> Tensor:
        """What multiplies the task vectors: the sample, divided by its mean if `rescale`."""
        return sample / self._mean(key, sample) if self.rescale else sample

    def _mean(self, key: str, sample: Tensor) -> Tensor:
        """Mean over the whole tensor, at least 1e-6."""
        if self.shards.size == 1:
            return sample.mean().clamp_min(_SMALLEST)
        return (self.shards.sum(sample.sum()) / math.prod(self.shapes[key])).clamp_min(_SMALLEST)

    def logit_gradient(self, key: str, sample: Tensor, gradient: Tensor) -> Tensor:
        """dL/dlogit from dL/dfactor, through the mean and the sigmoid."""
        if self.rescale:
            mean = self._mean(key, sample)
            product = self.shards.sum((gradient * sample).sum())
            through_mean = product / (mean * mean * math.prod(self.shapes[key]))
            gradient = gradient / mean - through_mean
        return gradient * sample * (1 - sample) / self.temperature

    def density(self) -> float:
        """Kept fraction over all masked units."""
        parts = [torch.sigmoid(logits).sum() for logits in self.logits.values()]
        kept = sum(self.shards.sum(torch.stack(parts)).tolist())
        return float(kept) / max(1, sum(math.prod(shape) for shape in self.shapes.values()))


def rescaled(mask: Tensor) -> Tensor:
    """The mask divided by its mean over the whole tensor (step 1 of the published loop)."""
    return mask / mask.mean().clamp_min(_SMALLEST)


def combine(masks: list[Tensor]) -> Tensor | None:
    """M = M1 o M2 from the factors in use; None when there is none (all kept)."""
    if not masks:
        return None
    product = masks[0]
    for mask in masks[1:]:
        product = product * mask
    return product
