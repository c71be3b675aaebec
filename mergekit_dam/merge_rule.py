"""The merge equation, once: theta = theta_0 + M o sum_t lambda_t (theta_t - theta_0), and its chain rule.

Source: DAM (arXiv 2410.13910), with M = M1 o M2 one mask for all models. The streaming merge and the learning
loop both call `merge`, so that they agree bit for bit. T models; tensors of any shape S, masks that broadcast
to S, coefficients (T,). Everything is computed in float32 and elementwise, hence commutes with sharding.

All of it runs over chunks that stay in the processor's cache: each tensor is read once, and no intermediate result of
a tensor's size exists. On accelerators kernels of our own do the same where they can (fused.py); elsewhere a chunk is
large there, for the number of kernels counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergekit_dam import fused
from mergekit_dam.masks import MaskProduct, chunk_numel

Mask = Tensor | MaskProduct


def task_vector(base: Tensor, model: Tensor) -> Tensor:
    """tau_t = theta_t - theta_0 in float32 (arXiv 2212.04089)."""
    return model.to(torch.float32) - base.to(torch.float32)


def merge(
    base: Tensor,
    models: Sequence[Tensor | None],
    coefficients: Tensor,
    mask: Mask | None,
    out: Tensor | None = None,
) -> Tensor:
    """theta, shape S, float32.

    Args:
        base: theta_0, shape S, any floating type.
        models: theta_t, each of shape S or None; a model that lacks the tensor (None) adds nothing.
        coefficients: lambda, shape (T,), float32.
        mask: M, broadcastable to S; None keeps everything.
        out: contiguous, shape S, any floating type: where theta goes; a new float32 tensor if not given.
    """
    if out is None:
        out = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    if fused.serves(base, mask):
        fused.merge(base, models, coefficients, mask, out)
        return out
    lambdas = coefficients.tolist()
    layout = _Layout(base, mask.shape if mask is not None else base.shape)
    work = _Work(layout, base.device)
    for base_c, *models_c, out_c, mask_c in zip(
        layout.split(base), *(layout.split(m) for m in models), layout.split(out), layout.split_mask(mask), strict=True
    ):
        total = work.total(base_c, models_c, lambdas)
        if mask_c is not None:
            total.mul_(mask_c)
        torch.add(total, base_c, out=out_c) if out_c.dtype == torch.float32 else out_c.copy_(total.add_(base_c))
    return out


def mask_gradient(
    gradient: Tensor, base: Tensor, models: Sequence[Tensor | None], coefficients: Tensor, out: Tensor
) -> None:
    """Adds dL/dM = dL/dtheta o sum_t lambda_t tau_t, summed over what one mask entry covers, to `out` (M's shape)."""
    gradients(gradient, base, models, coefficients, None, mask_out=out)


def coefficient_gradient(gradient: Tensor, base: Tensor, models: Sequence[Tensor | None], mask: Mask | None) -> Tensor:
    """dL/dlambda_t = <dL/dtheta, M o tau_t>, shape (T,)."""
    out = torch.zeros(len(models), dtype=torch.float32, device=base.device)
    gradients(gradient, base, models, None, mask, coefficient_out=out)
    return out


def gradients(
    gradient: Tensor,
    base: Tensor,
    models: Sequence[Tensor | None],
    coefficients: Tensor | None,
    mask: Mask | None,
    *,
    mask_out: Tensor | None = None,
    coefficient_out: Tensor | None = None,
) -> None:
    """Both gradients in one reading of the tensors; each is added to its `out` where that is given.

    Args:
        gradient: dL/dtheta, shape S, any floating type.
        coefficients: lambda (T,), needed for `mask_out`.
        mask: M, needed for `coefficient_out`; None keeps everything.
        mask_out: contiguous, float32, of M's shape.
        coefficient_out: (T,), float32.
    """
    everything = all(part is not None for part in (coefficients, mask, mask_out, coefficient_out))
    if everything and fused.serves(base, mask):
        assert coefficients is not None and coefficient_out is not None
        fused.gradients(gradient, base, models, coefficients, mask, coefficient_out=coefficient_out, mask_out=mask_out)
        return
    lambdas = coefficients.tolist() if coefficients is not None and mask_out is not None else None
    shape = mask_out.shape if mask_out is not None else mask.shape if mask is not None else base.shape
    layout = _Layout(base, shape)
    work = _Work(layout, base.device)
    products: list[list[Tensor]] = [[] for _ in models]
    for gradient_c, base_c, *models_c, out_c, mask_c in zip(
        layout.split(gradient), layout.split(base), *(layout.split(m) for m in models), layout.split_mask(mask_out),
        layout.split_mask(mask if coefficient_out is not None else None), strict=True,
    ):  # fmt: skip
        gradient_c = work.float32(gradient_c)
        masked = None
        if coefficient_out is not None:
            masked = gradient_c if mask_c is None else work.masked(gradient_c, mask_c)
        total = work.total(base_c, models_c, lambdas, masked, products)
        if out_c is not None:
            layout.add_to_mask(out_c, total.mul_(gradient_c))
    if coefficient_out is not None:
        _add_products(products, coefficient_out)


def logit_gradients(
    gradient: Tensor,
    base: Tensor,
    models: Sequence[Tensor | None],
    coefficients: Tensor,
    mask: MaskProduct,
    wanted: Sequence[int],
    *,
    coefficient_out: Tensor,
) -> list[Tensor]:
    """`gradients` and then `mask.logit_gradients`, without dL/dM in between: the same values from one reading of all.

    Args:
        gradient: dL/dtheta, shape S, any floating type.
        coefficients: lambda (T,).
        mask: M, of shape S and not rescaled (`mask.separate`).
        wanted: indices of its factors.
        coefficient_out: (T,), float32; dL/dlambda is added to it.

    Returns:
        dL/dlogit of the wanted factors, each of shape S, float32.
    """
    if fused.serves(base, mask) and tuple(wanted) == tuple(range(len(mask.factors))):
        found = [torch.empty(base.shape, dtype=torch.float32, device=base.device) for _ in wanted]
        fused.gradients(gradient, base, models, coefficients, mask, coefficient_out=coefficient_out, logits_out=found)
        return found
    lambdas = coefficients.tolist()
    layout = _Layout(base, mask.shape)
    work = _Work(layout, base.device)
    products: list[list[Tensor]] = [[] for _ in models]
    found = [torch.empty(base.shape, dtype=torch.float32, device=base.device) for _ in wanted]
    for gradient_c, base_c, *models_c, (mask_c, values), outs_c in zip(
        layout.split(gradient), layout.split(base), *(layout.split(m) for m in models),
        mask.chunks_with_factors(layout.size), zip(*(layout.split(out) for out in found), strict=True), strict=True,
    ):  # fmt: skip
        gradient_c = work.float32(gradient_c)
        total = work.total(base_c, models_c, lambdas, work.masked(gradient_c, mask_c), products)
        mask.to_logits(total.mul_(gradient_c).mul_(mask_c), values, wanted, outs_c)
    _add_products(products, coefficient_out)
    return found


class _Layout:
    """How a tensor of shape S and its mask are cut: in rows where an entry covers a row, else in flat pieces."""

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
        if tensor is None:
            return [None] * self.count
        view = tensor.reshape(self.shape[0], -1) if self.rows else tensor.reshape(-1)
        chunks: tuple[Tensor, ...] = view.split(self.size)
        return chunks

    def split_mask(self, mask: Mask | None) -> Iterator[Tensor | None]:
        """Chunks of M that broadcast to those of the tensor."""
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

    def add_to_mask(self, out: Tensor, gradient: Tensor) -> None:
        if self.rows:
            out.add_(gradient.sum(1, keepdim=True))
        elif self.single:
            out.add_(gradient.sum())
        else:
            out.add_(gradient)


def _add_products(products: Sequence[Sequence[Tensor]], out: Tensor) -> None:
    for t, found in enumerate(products):
        if found:
            out[t] += torch.stack(list(found)).sum()


class _Work:
    """Buffers of one chunk, used again for every chunk of a tensor."""

    def __init__(self, layout: _Layout, device: torch.device) -> None:
        self._buffers = torch.empty((4, layout.largest), dtype=torch.float32, device=device).unbind()

    def _like(self, index: int, chunk: Tensor) -> Tensor:
        return self._buffers[index][: chunk.numel()].view(chunk.shape)

    def float32(self, chunk: Tensor) -> Tensor:
        return chunk if chunk.dtype == torch.float32 else self._like(3, chunk).copy_(chunk)

    def masked(self, gradient: Tensor, mask: Tensor) -> Tensor:
        return torch.mul(gradient, mask, out=self._like(2, gradient))

    def total(
        self,
        base: Tensor,
        models: Sequence[Tensor | None],
        lambdas: Sequence[float] | None,
        masked: Tensor | None = None,
        products: Sequence[list[Tensor]] = (),
    ) -> Tensor:
        """sum_t lambda_t tau_t; <masked, tau_t> is noted in `products` on the way."""
        total, tau = self._like(0, base), self._like(1, base)
        if lambdas is not None:
            total.zero_()
        for t, model in enumerate(models):
            if model is None:
                continue
            if model.dtype == base.dtype == torch.float32:
                torch.sub(model, base, out=tau)
            else:
                tau.copy_(model).sub_(base)
            if masked is not None:
                products[t].append(torch.dot(masked.reshape(-1), tau.reshape(-1)))
            if lambdas is not None:
                total.add_(tau, alpha=lambdas[t])
        return total
