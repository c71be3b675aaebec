"""Split a tensor of shape S and its mask into chunks that fit into the processor's cache, with buffers for a chunk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergekit_dam.merging.mask_product import MaskProduct, chunk_numel, has_own

Mask = Tensor | MaskProduct


def gradient_shape(mask: Mask) -> torch.Size:
    """Shape of dL/dM; see `MaskProduct.gradient_shape`."""
    return mask.gradient_shape if isinstance(mask, MaskProduct) else mask.shape


class Layout:
    """The split of a tensor of shape S and its mask: in rows where a mask entry covers a row, else in flat pieces."""

    def __init__(self, like: Tensor, mask_shape: Sequence[int]) -> None:
        self.shape = like.shape
        numel = like.numel()
        entries = torch.Size(mask_shape).numel()
        self.single = entries == 1 and numel > 1
        self.rows = (
            not self.single and entries != numel and tuple(mask_shape) == (like.shape[0], *[1] * (like.ndim - 1))
        )
        self.expand = not self.single and not self.rows and entries != numel
        chunk = chunk_numel(like.device)
        self.size = max(1, chunk // max(1, numel // entries)) if self.rows else chunk
        self.count = max(1, -(-(like.shape[0] if self.rows else numel) // self.size))
        self.largest = min(numel, self.size * (numel // entries) if self.rows else self.size)

    def split(self, tensor: Tensor | None) -> Sequence[Tensor | None]:
        """Chunks of a tensor of shape S, as views; for None, a None per chunk."""
        if tensor is None:
            return [None] * self.count
        view = tensor.reshape(self.shape[0], -1) if self.rows else tensor.reshape(-1)
        chunks: tuple[Tensor, ...] = view.split(self.size)
        return chunks

    def split_mask(self, mask: Mask | None) -> Iterator[Tensor | None]:
        """Chunks of M that broadcast to the tensor's chunks."""
        if mask is None:
            yield from [None] * self.count
        elif isinstance(mask, MaskProduct):
            if self.expand:
                yield from self.split_mask(mask.full())
            elif self.single:
                yield from [mask.full().reshape(1)] * self.count
            else:
                yield from (c.unsqueeze(1) if self.rows else c for c in mask.chunks(self.size))
        elif self.single:
            yield from [mask.reshape(1)] * self.count
        elif self.rows:
            yield from mask.reshape(-1, 1).split(self.size)
        else:
            yield from mask.expand(self.shape).reshape(-1).split(self.size)

    def split_own(self, mask: Mask | None) -> Iterator[Sequence[Tensor | None]]:
        """Chunks of the models' own factors, T at a time; () per chunk where models have no own factors."""
        if not has_own(mask):
            return itertools.repeat((), self.count)
        return zip(*(self.split_mask(mask.of_model(t)) for t in range(len(mask.own))), strict=True)

    def split_shared(self, mask: Mask | None) -> Iterator[Tensor | None]:
        """Chunks of the factor that multiplies the task vectors of all models."""
        return self.split_mask(mask.shared if isinstance(mask, MaskProduct) else mask)

    def add_to_mask(self, out: Tensor, gradient: Tensor) -> None:
        """Add a chunk's dL/dM to the gradient of the mask entries that cover it."""
        if self.rows:
            out.add_(gradient.sum(1, keepdim=True))
        elif self.single:
            out.add_(gradient.sum())
        else:
            out.add_(gradient)


def add_products(products: Sequence[Sequence[Tensor]], out: Tensor) -> None:
    """Sum each model's products over the chunks, and add the sums to `out`, (T,)."""
    for t, of_chunks in enumerate(products):
        if of_chunks:
            out[t] += torch.stack(list(of_chunks)).sum()


class ChunkBuffers:
    """Buffers for one chunk, reused for every chunk of a tensor."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._buffers = torch.empty((4, layout.largest), dtype=torch.float32, device=device).unbind()

    def _like(self, index: int, chunk: Tensor) -> Tensor:
        return self._buffers[index][: chunk.numel()].view(chunk.shape)

    def float32(self, chunk: Tensor) -> Tensor:
        """Return the chunk itself if it is float32, else a float32 copy."""
        return chunk if chunk.dtype == torch.float32 else self._like(3, chunk).copy_(chunk)

    def masked(self, gradient: Tensor, mask: Tensor) -> Tensor:
        """Compute dL/dtheta o M."""
        return torch.mul(gradient, mask, out=self._like(2, gradient))

    def total(self, like: Tensor) -> Tensor:
        """Return uninitialised memory for a sum over models."""
        return self._like(0, like)

    def task_vectors(self, base: Tensor, models: Sequence[Tensor | None]) -> Iterator[tuple[int, Tensor]]:
        """Yield t and tau_t of the models that have the tensor; tau_t may be changed, and the next overwrites it."""
        tau = self._like(1, base)
        for t, model in enumerate(models):
            if model is None:
                continue
            if model.dtype == base.dtype == torch.float32:
                torch.sub(model, base, out=tau)
            else:
                tau.copy_(model).sub_(base)
            yield t, tau
