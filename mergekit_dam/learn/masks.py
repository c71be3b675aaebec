"""Concrete (Gumbel-sigmoid) masks over the task vectors (arXiv 1611.00712), one logit per masked unit.

Two of them, Task-Shared (M1) and Backdoor-Detection (M2), make the mask M = M1 o M2 of the merge equation
(DAM, arXiv 2410.13910). Keys are checkpoint tensor names. `density` is the kept fraction, the mean of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.merging.foreach import groups, sums_of_sigmoids
from mergekit_dam.merging.mask_bytes import to_probabilities
from mergekit_dam.merging.mask_keys import own_key
from mergekit_dam.merging.mask_product import SMALLEST, MaskProduct, chunk_numel, means_of
from mergekit_dam.seeds import generator

_INSIDE = 2.0**-24  # from 0 or 1 to the nearest sample; half of float32's step below 1


class ConcreteMask:
    """Mask logits for a set of tensors.

    Args:
        shapes: tensor name, or `own_key` of it where each model has a mask of its own -> shape of the mask.
        name: `task_shared` or `backdoor_detection`; it seeds the noise, too.
        temperature: of the relaxation; lower is closer to 0/1.
        rescale: divide each tensor's mask by its mean, so that its density does not scale the task vector.
        initial_logit: start of all logits.
        device: where logits live.
        shards: processes that hold the masks' rows; ALONE for masks that every process holds whole.
        owners: T where each model has a mask of its own, 0 where one is for all.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], *, name: str, temperature: float, rescale: bool,
        initial_logit: float, device: torch.device, shards: Shards = ALONE, owners: int = 0,
    ) -> None:  # fmt: skip
        self.name, self.temperature, self.rescale, self.shards = name, temperature, rescale, shards
        self.owners = owners
        self.shapes = dict(shapes)
        self.logits = {
            key: torch.full(shards.local_shape(shape), initial_logit, dtype=torch.float32, device=device)
            for key, shape in shapes.items()
        }

    def keys_of(self, name: str) -> list[str]:
        """Of a tensor's logits: one, or one per model."""
        return [own_key(model, name) for model in range(self.owners)] if self.owners else [name]

    def sample(self, key: str, *, seed: int, step: int) -> Tensor:
        """One relaxed sample in (0, 1) of the mask of a tensor: sigmoid((logit + logistic noise) / temperature).

        The noise depends on (seed, step, mask, tensor) alone, not on the order of calls, nor on chunks or device.
        """
        logits = self.logits[key]
        source = generator(self.name, key, seed, step)
        sample = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        size = chunk_numel(logits.device)
        for unused in range(self._before(key), 0, -size):  # rows of other processes come first
            torch.empty(min(size, unused)).uniform_(generator=source)
        for part, logit in zip(sample.view(-1).split(size), logits.view(-1).split(size), strict=True):
            noise = part if part.device.type == "cpu" else torch.empty(part.shape)
            noise.uniform_(generator=source).logit_(eps=SMALLEST)
            part.copy_(noise).add_(logit).div_(self.temperature).sigmoid_()
            part.clamp_(_INSIDE, 1.0 - _INSIDE)  # the sigmoid of a float32 above 17 is 1
        return sample

    def _before(self, key: str) -> int:
        """Units of a mask that other processes hold and that come before ours."""
        shape = self.shapes[key] or (1,)
        return int(self.shards.rows(shape[0]).start) * math.prod(shape[1:])

    def mean(self, key: str, values: Tensor) -> Tensor:
        """Mean over the whole of a mask from our values of it, 0-dim, not zero."""
        if self.shards.size == 1:
            return means_of([values])[0]
        return (self.shards.sum(to_probabilities(values).sum()) / math.prod(self.shapes[key])).clamp_min(SMALLEST)

    def expectation(self, key: str) -> Tensor:
        """Probability that a unit is kept, sigmoid(logit): the mask that is saved, not one random sample."""
        return torch.sigmoid(self.logits[key])

    def density(self) -> float:
        """Kept fraction over all masked units."""
        kept = self.shards.sum(self._kept().to(torch.float64))
        return float(kept) / max(1, sum(math.prod(shape) for shape in self.shapes.values()))

    def _kept(self) -> Tensor:
        """Sum of the probabilities of all units held here."""
        every = list(self.logits.values())
        size = chunk_numel(every[0].device)
        if every[0].device.type != "cpu":
            sums = [sums_of_sigmoids(group).double().sum() for group in groups(every, size, Tensor.numel)]
        else:
            sums = [part.sigmoid().sum().double() for logits in every for part in logits.view(-1).split(size)]
        return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=every[0].device)


def product(masks: Sequence[ConcreteMask], key: str, samples: Sequence[Tensor] | None = None) -> MaskProduct:
    """M = M1 o M2 of one tensor at one sample of each mask, or at their probabilities.

    Args:
        samples: of masks that all models share.
    """
    shared = [mask for mask in masks if not mask.owners]
    factors = tuple(samples) if samples is not None else tuple(mask.logits[key] for mask in shared)
    own = tuple(mask.logits[one] for mask in masks if mask.owners for one in mask.keys_of(key))
    means = None
    if masks[0].rescale:
        values = factors if samples is not None else tuple(mask.expectation(key) for mask in shared)
        means = tuple(mask.mean(key, value) for mask, value in zip(shared, values, strict=True))
    first = masks[0]
    entries = math.prod(first.shapes[first.keys_of(key)[0]])
    return MaskProduct(factors, samples is None, means, first.temperature, first.shards.sum, entries, own)
