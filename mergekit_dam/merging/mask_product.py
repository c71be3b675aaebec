"""Form M = M1 o M2 of a tensor chunk by chunk, and propagate gradients back to the logits. T models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import TypeIs

from mergekit_dam.merging.mask_bytes import STEPS, to_probabilities

SMALLEST = 1e-6  # keeps the mean of a mask away from zero
_IN_CACHE = 1 << 17  # elements, 512 KiB in float32: with smaller chunks calls cost more than the cache saves (measured)
_ON_DEVICE = 1 << 26  # elements, 256 MiB in float32: here a launch costs more than a pass through memory


def chunk_numel(device: torch.device) -> int:
    """Elements of a chunk of elementwise work."""
    return _IN_CACHE if device.type == "cpu" else _ON_DEVICE


def together_numel(device: torch.device, total: int) -> int:
    """Elements of the tensors that an optimiser step takes together, of `total` elements.

    On the CPU a step takes one tensor, so that never two gradients exist. On an accelerator it takes enough for few
    calls, in little memory compared to masks and moments.
    """
    return 1 if device.type == "cpu" else max(2 * _ON_DEVICE, total // 8)


def _identity(total: Tensor) -> Tensor:
    return total


@dataclass(frozen=True, eq=False)
class MaskProduct:
    """M = prod_i f_i of a tensor, formed chunk by chunk and never stored whole.

    Where models have own factors, model t's task vector is multiplied by M_t = M o own_t.

    Attributes:
        factors: a factor per mask that all models share, of M's shape: samples or probabilities in any floating type or
            as bytes (mask_bytes.py), or logits.
        logits: whether a factor is a logit, so that sigmoid makes it a probability.
        means: mean of each factor, 0-dim, by which f_i is divided; None where masks are not rescaled.
        temperature: of the relaxation, for the gradient.
        all_reduce: turns a sum over the entries of this shard into the sum over the whole tensor.
        entries: number of entries of the whole tensor; 0 if this shard is the whole tensor.
        own: a further factor per model, T of M's shape, or (); () where masks are rescaled.
    """

    factors: tuple[Tensor, ...]
    logits: bool = False
    means: tuple[Tensor, ...] | None = None
    temperature: float = 1.0
    all_reduce: Callable[[Tensor], Tensor] = _identity
    entries: int = 0
    own: tuple[Tensor, ...] = ()

    @property
    def shape(self) -> torch.Size:
        return self.parts[0].shape

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All factors, the models' own factors last."""
        return (*self.factors, *self.own)

    @property
    def gradient_shape(self) -> torch.Size:
        """Shape of dL/dM; (T, *shape), for dL/dM_t, where models have own factors."""
        return torch.Size((len(self.own), *self.shape)) if self.own else self.shape

    @property
    def shared(self) -> MaskProduct | None:
        """The factor of all task vectors; None where models have only own factors."""
        return replace(self, own=()) if self.factors else None

    def of_model(self, model: int) -> MaskProduct | None:
        """own_t as a product; None where models have no own factors."""
        return replace(self, factors=(self.own[model],), means=None, own=()) if self.own else None

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Yield M, flat, in float32, `size` entries at a time; each chunk overwrites the last."""
        if all(factor.dtype == torch.uint8 for factor in self.factors):
            return self._chunks_of_bytes(size)
        return (product for product, _ in self.chunks_with_factors(size))

    def _chunks_of_bytes(self, size: int) -> Iterator[Tensor]:
        """`chunks` for factors that are all bytes: they are multiplied first, and divided once."""
        product_buffer, buffer = self._buffers(size, 2)
        scale = self._scale()
        for first, *others in zip(*(f.reshape(-1).split(size) for f in self.factors), strict=True):
            product = product_buffer[: first.numel()].copy_(first)
            for part in others:
                product.mul_(buffer[: part.numel()].copy_(part))
            product.div_(STEPS ** len(self.factors))
            yield product if scale is None else product.mul_(scale)

    def chunks_with_factors(self, size: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield chunks of M as `chunks` does, each with the chunks of all s_i, in float32."""
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
        """Form M as a tensor of `gradient_shape`, float32."""
        if self.own:
            return torch.stack([replace(self, factors=(*self.factors, own), own=()).full() for own in self.own])
        out = torch.empty(self.shape, dtype=torch.float32, device=self.factors[0].device)
        size = chunk_numel(out.device)
        for part, chunk in zip(out.view(-1).split(size), self.chunks(size), strict=True):
            part.copy_(chunk)
        return out

    def logit_gradients(self, gradient: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """Compute dL/dlogit of the wanted masks from dL/dM, through the means and the sigmoid.

        With s_i the sample or probability, n entries and h = dL/dM o M:
        dL/dlogit_i = (h - s_i sum(h) / (n mean_i)) (1 - s_i) / temperature, the middle term where masks are rescaled.
        Model t's own factor has h_t = dL/dM_t o M_t; shared factors get the sum of h_t over models.

        Args:
            gradient: dL/dM, of `gradient_shape`, contiguous, float32; it is overwritten.
            wanted: indices of `parts`; all of them where models have own factors.
        """
        if self.own:
            return self._logit_gradients_per_model(gradient)
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
        total = self.all_reduce(torch.stack(totals).sum()) / (self.entries or gradient.numel())
        logit_gradients = []
        for i in wanted:
            # the last may reuse the gradient's memory
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
            logit_gradients.append(out)
        return logit_gradients

    def _logit_gradients_per_model(self, gradient: Tensor) -> list[Tensor]:
        """`logit_gradients` where models have own factors."""
        h_T = list(gradient)
        if self.shared is not None:
            m = self.shared.full()
            for h in h_T:
                h.mul_(m)
        total = torch.zeros_like(h_T[0])
        for h, own in zip(h_T, self.own, strict=True):
            s = self._value(own, torch.empty_like(h))
            total.add_(h.mul_(s))
            self.to_logits(h, [s], [0], [h])
        shared = [torch.empty_like(total) for _ in self.factors]
        values = [self._value(f, torch.empty_like(total)) for f in self.factors]
        self.to_logits(total, values, range(len(shared)), shared)
        return [*shared, *h_T]

    def to_logits(self, h: Tensor, values: Sequence[Tensor], wanted: Sequence[int], to: Sequence[Tensor]) -> None:
        """Write h (1 - s_i) / temperature of a chunk to `to`, for masks that are not rescaled; see `logit_gradients`.

        Args:
            h: dL/dM o M; the last of `to` may share its memory.
            values: all s_i.
            wanted: indices of factors, as many as tensors in `to`.
        """
        for i, out in zip(wanted, to, strict=True):
            torch.addcmul(h, h, values[i], value=-1.0, out=out)
            if self.temperature != 1.0:
                out.div_(self.temperature)

    def _value(self, part: Tensor, out: Tensor) -> Tensor:
        return torch.sigmoid(part, out=out) if self.logits else to_probabilities(part, out)

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


def has_own(mask: object) -> TypeIs[MaskProduct]:
    """Whether the mask has own factors of models."""
    return isinstance(mask, MaskProduct) and len(mask.own) > 0


def means_of(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Mean of each factor over its whole tensor, never zero, for rescaling (step 1 of the published loop)."""
    means = (v.mean(dtype=torch.float32) / (STEPS if v.dtype == torch.uint8 else 1) for v in values)
    return tuple(mean.clamp_min(SMALLEST) for mean in means)
