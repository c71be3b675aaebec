"""Concrete (Gumbel-sigmoid) masks over the task vectors (arXiv 1611.00712), one logit per masked unit.

Two of them, Task-Shared (M1) and Backdoor-Detection (M2), make the mask M = M1 o M2 of the merge equation
(DAM, arXiv 2410.13910). Keys are checkpoint tensor names. `density` is the kept fraction, the mean of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergekit_dam.distributed.shards import ALONE, Shards
from mergekit_dam.grouped import groups, sums_of_sigmoids
from mergekit_dam.seeds import generator

Granularity = Literal["element", "row", "tensor"]
TASK_SHARED, BACKDOOR_DETECTION = "task_shared", "backdoor_detection"
_INSIDE = 2.0**-24  # from 0 or 1 to the nearest sample; half of float32's step below 1
_SMALLEST = 1e-6  # keeps the noise finite and the mean of a mask away from zero
_IN_CACHE = 1 << 17  # elements, 512 KiB in float32: smaller ones cost more in calls than the cache saves (measured)
_ON_DEVICE = 1 << 26  # elements: 256 MiB in float32; here a launch costs more than a pass through memory


def chunk_numel(device: torch.device) -> int:
    """Elements that elementwise work takes at a time."""
    return _IN_CACHE if device.type == "cpu" else _ON_DEVICE


def together_numel(device: torch.device, total: int) -> int:
    """Elements of the tensors that are stepped together, out of `total`: one tensor on the CPU, so that no two
    gradients exist; on an accelerator enough that there are few calls, in little memory beside masks and moments."""
    return 1 if device.type == "cpu" else max(2 * _ON_DEVICE, total // 8)


def mask_shape(shape: torch.Size | tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Shape of a mask that broadcasts to a tensor of `shape`: all, one entry per row (dim 0), or one."""
    if granularity == "element":
        return tuple(shape)
    if granularity == "row" and len(shape) > 0:
        return (shape[0], *[1] * (len(shape) - 1))
    return (1,) * len(shape)


def _identity(total: Tensor) -> Tensor:
    return total


@dataclass(frozen=True, eq=False)
class MaskProduct:
    """M = prod_i f_i of one tensor, formed chunk by chunk where it is used and never stored.

    Attributes:
        factors: one per mask in use, all of M's shape: samples or probabilities in any floating type, or logits.
        logits: whether a factor is a logit, so that sigmoid makes it a probability.
        means: where masks are rescaled, the mean of each factor, 0-dim: f_i is divided by it.
        temperature: of the relaxation, for the gradient.
        add_up: makes the sum over the whole tensor from that over the entries held here.
        entries: of the whole tensor; 0 for those held here.
    """

    factors: tuple[Tensor, ...]
    logits: bool = False
    means: tuple[Tensor, ...] | None = None
    temperature: float = 1.0
    add_up: Callable[[Tensor], Tensor] = _identity
    entries: int = 0

    @property
    def shape(self) -> torch.Size:
        return self.factors[0].shape

    def chunks(self, size: int) -> Iterator[Tensor]:
        """M, flat, `size` entries at a time in float32. Each chunk is overwritten by the next."""
        return (product for product, _ in self.chunks_with_factors(size))

    def chunks_with_factors(self, size: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """M as `chunks` gives it, and beside each chunk those of the s_i, in float32."""
        product_buffer, *buffers = self._buffers(size, 1 + len(self.factors))
        scale = self._scale()
        for parts in zip(*(f.reshape(-1).split(size) for f in self.factors), strict=True):
            product = product_buffer[: parts[0].numel()]
            values = [self._value(part, b[: part.numel()]) for part, b in zip(parts, buffers, strict=True)]
            torch.mul(values[0], values[1], out=product) if len(values) > 1 else product.copy_(values[0])
            for value in values[2:]:
                product.mul_(value)
            yield product if scale is None else product.mul_(scale), values

    @property
    def separate(self) -> bool:
        """Whether no entry's gradient depends on another entry: masks are not rescaled."""
        return self.means is None

    def full(self) -> Tensor:
        """M as one tensor, float32."""
        out = torch.empty(self.shape, dtype=torch.float32, device=self.factors[0].device)
        size = chunk_numel(out.device)
        for part, chunk in zip(out.view(-1).split(size), self.chunks(size), strict=True):
            part.copy_(chunk)
        return out

    def logit_gradients(self, gradient: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """dL/dlogit of the wanted masks from dL/dM, through the means and the sigmoid.

        With s_i the sample or probability, n entries and h = dL/dM o M:
        dL/dlogit_i = (h - s_i sum(h) / (n mean_i)) (1 - s_i) / temperature, the middle term where masks are rescaled.

        Args:
            gradient: dL/dM, contiguous, float32; it is overwritten.
            wanted: indices of factors.
        """
        size = chunk_numel(gradient.device)
        pieces = gradient.view(-1).split(size)
        if self.separate:
            outs = [gradient if i == wanted[-1] else torch.empty_like(gradient) for i in wanted]
            split = [out.view(-1).split(size) for out in outs]
            for h, (product, values), *to in zip(pieces, self.chunks_with_factors(size), *split, strict=True):
                self.to_logits(h.mul_(product), values, wanted, to)
            return outs
        totals = []
        for h, product in zip(pieces, self.chunks(size), strict=True):
            totals.append(h.mul_(product).sum())
        total = self.add_up(torch.stack(totals).sum()) / (self.entries or gradient.numel())
        found = []
        for i in wanted:
            # the last one may have the gradient's own memory
            out = gradient if i == wanted[-1] else torch.empty_like(gradient)
            (value, work) = self._buffers(size, 2)
            assert self.means is not None
            through_mean = total / self.means[i]
            for h, part, to in zip(
                pieces, self.factors[i].reshape(-1).split(size), out.view(-1).split(size), strict=True
            ):
                s = self._value(part, value[: part.numel()])
                h = torch.sub(h, torch.mul(s, through_mean, out=work[: part.numel()]), out=work[: part.numel()])
                torch.addcmul(h, h, s, value=-1.0, out=to).div_(self.temperature)
            found.append(out)
        return found

    def to_logits(self, h: Tensor, values: Sequence[Tensor], wanted: Sequence[int], to: Sequence[Tensor]) -> None:
        """h (1 - s_i) / temperature of one chunk into `to`, for masks that are not rescaled; see `logit_gradients`.

        Args:
            h: dL/dM o M; the last of `to` may have its memory.
            values: all s_i.
            wanted: indices of factors, one per tensor of `to`.
        """
        for i, out in zip(wanted, to, strict=True):
            torch.addcmul(h, h, values[i], value=-1.0, out=out)
            if self.temperature != 1.0:
                out.div_(self.temperature)

    def _value(self, part: Tensor, out: Tensor) -> Tensor:
        return torch.sigmoid(part, out=out) if self.logits else out.copy_(part)

    def _scale(self) -> Tensor | None:
        if self.means is None:
            return None
        scale = torch.ones((), device=self.factors[0].device)
        for mean in self.means:
            scale = scale / mean
        return scale

    def _buffers(self, size: int, count: int) -> Sequence[Tensor]:
        numel = min(size, self.factors[0].numel())
        return torch.empty((count, numel), dtype=torch.float32, device=self.factors[0].device).unbind()


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
            noise.uniform_(generator=source).logit_(eps=_SMALLEST)
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
        return (self.shards.sum(values.float().sum()) / math.prod(self.shapes[key])).clamp_min(_SMALLEST)

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
            sums = [sums_of_sigmoids(group).double().sum() for group in groups(every, size)]
        else:
            sums = [part.sigmoid().sum().double() for logits in every for part in logits.view(-1).split(size)]
        return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=every[0].device)


def product(masks: Sequence[ConcreteMask], key: str, samples: Sequence[Tensor] | None = None) -> MaskProduct:
    """M = M1 o M2 of one tensor at one sample of each mask, or at their probabilities."""
    factors = tuple(samples) if samples is not None else tuple(mask.logits[key] for mask in masks)
    means = None
    if masks[0].rescale:
        values = factors if samples is not None else tuple(mask.expectation(key) for mask in masks)
        means = tuple(mask.mean(key, value) for mask, value in zip(masks, values, strict=True))
    first = masks[0]
    return MaskProduct(
        factors, samples is None, means, first.temperature, first.shards.sum, math.prod(first.shapes[key])
    )


def means_of(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Mean of each factor over its whole tensor, by which it is divided (step 1 of the published loop); not zero."""
    return tuple(value.mean(dtype=torch.float32).clamp_min(_SMALLEST) for value in values)
