"""Compute the merge equation, theta = theta_0 + M o sum_t lambda_t (theta_t - theta_0), and its chain rule.

Source: DAM (arXiv 2410.13910), with M = M1 o M2 one mask for all models. Or each model's tau_t has its own M2,
theta = theta_0 + M1 o sum_t lambda_t M2_t o tau_t, so that a suspect model can be masked without hurting the other
models. The streaming merge and the learning loop both call `merge`, so that they agree bit for bit, including the
rounding to the type of `out`. T models; tensors of any shape S, masks that broadcast to S, coefficients (T,).
Everything is computed in float32 and elementwise, so that it commutes with sharding.

The work runs over chunks that fit into the processor's cache: each tensor is read once, and no intermediate result of
a tensor's size exists. On accelerators our own kernels do the same where they can (triton_merge.py). Where they cannot,
a chunk on an accelerator is large, because the number of launches decides the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mergekit_dam.merging import triton_merge
from mergekit_dam.merging.chunks import ChunkBuffers, Layout, Mask, add_products
from mergekit_dam.merging.mask_product import MaskProduct, has_own


def task_vector(base: Tensor, model: Tensor) -> Tensor:
    """Compute tau_t = theta_t - theta_0 in float32 (arXiv 2212.04089)."""
    return model.to(torch.float32) - base.to(torch.float32)


def merge(
    base: Tensor,
    models: Sequence[Tensor | None],
    coefficients: Tensor,
    mask: Mask | None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute theta, shape S, in float32 unless `out` is given.

    Args:
        base: theta_0, shape S, any floating type.
        models: theta_t, each of shape S or None; a model that lacks the tensor (None) adds nothing.
        coefficients: lambda, shape (T,), float32.
        mask: M, broadcastable to S; None keeps everything.
        out: tensor to write theta to, contiguous, shape S, any floating type; a new float32 tensor if not given.
    """
    if out is None:
        out = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    if triton_merge.serves(base, mask):
        triton_merge.merge(base, models, coefficients, mask, out)
        return out
    lambdas = coefficients.tolist()
    layout = Layout(base, mask.shape if mask is not None else base.shape)
    buffers = ChunkBuffers(layout, base.device)
    for base_c, *models_c, out_c, mask_c, owns_c in zip(
        layout.split(base),
        *(layout.split(m) for m in models),
        layout.split(out),
        layout.split_shared(mask),
        layout.split_own(mask),
        strict=True,
    ):
        total = buffers.total(base_c).zero_()
        for t, tau in buffers.task_vectors(base_c, models_c):
            if owns_c:
                tau.mul_(owns_c[t])
            total.add_(tau, alpha=lambdas[t])
        if mask_c is not None:
            total.mul_(mask_c)
        torch.add(total, base_c, out=out_c) if out_c.dtype == torch.float32 else out_c.copy_(total.add_(base_c))
    return out


def gradients(
    gradient: Tensor,
    base: Tensor,
    models: Sequence[Tensor | None],
    coefficients: Tensor | None,
    mask: Mask | None,
    *,
    coefficient_out: Tensor | None = None,
    mask_out: Tensor | None = None,
    logits_out: Sequence[Tensor] = (),
    wanted: Sequence[int] = (),
) -> None:
    """Compute the gradients of `merge`, reading each tensor once.

    With G = dL/dtheta: dL/dlambda_t = <G, M o tau_t> and dL/dM = G o sum_t lambda_t tau_t, summed over the elements
    that a mask entry covers. Where models have own factors, dL/dlambda_t = <G o M1, M2_t o tau_t> and
    dL/dM_t = G o lambda_t tau_t. dL/dlogit follows from h = dL/dM o M (`MaskProduct.to_logits`).

    Args:
        gradient: G, shape S, any floating type.
        coefficients: lambda (T,), needed for `mask_out` and `logits_out`.
        mask: M, needed for `coefficient_out`, for `logits_out` and where models have own factors; None keeps
            everything.
        coefficient_out: (T,), float32: dL/dlambda is added to it.
        mask_out: contiguous, float32, of M's `gradient_shape`: dL/dM is added to it.
        logits_out: tensors to write dL/dlogit of the wanted factors to, each of shape S, contiguous, float32; for a
            mask of shape S that is not rescaled (`MaskProduct.separate`). Not together with `mask_out`.
        wanted: indices of the mask's `parts`; all of them where models have own factors.
    """
    owned, product = has_own(mask), cast(MaskProduct, mask)  # a product in all cases with logits
    if _on_accelerator(base, coefficients, mask, coefficient_out, mask_out, wanted):
        assert coefficients is not None and coefficient_out is not None
        triton_merge.gradients(
            gradient,
            base,
            models,
            coefficients,
            mask,
            coefficient_out=coefficient_out,
            mask_out=mask_out,
            logits_out=logits_out,
        )
        return
    sums = mask_out is not None or bool(logits_out)
    lambdas = coefficients.tolist() if coefficients is not None and sums else None
    shape = mask.shape if mask is not None else mask_out.shape if mask_out is not None else base.shape
    layout = Layout(base, shape)
    buffers = ChunkBuffers(layout, base.device)
    products: list[list[Tensor]] = [[] for _ in models]
    num_shared = len(logits_out) - len(models) if owned else len(logits_out)
    needed = mask if coefficient_out is not None or logits_out else None
    for gradient_c, base_c, *models_c, (mask_c, values), owns_c, sums_c, logits_c in zip(
        layout.split(gradient),
        layout.split(base),
        *(layout.split(m) for m in models),
        _factors(needed, layout, separately=bool(logits_out)),
        layout.split_own(mask),
        _each(layout.split_mask, _by_model(mask_out, owned), layout.count),
        _each(layout.split, logits_out, layout.count),
        strict=True,
    ):
        gradient_c = buffers.float32(gradient_c)
        masked = gradient_c if mask_c is None else buffers.masked(gradient_c, mask_c)
        total = buffers.total(base_c)
        if lambdas is not None and not (owned and sums_c):
            total.zero_()
        for t, tau in buffers.task_vectors(base_c, models_c):
            if owned and sums_c and lambdas is not None:
                layout.add_to_mask(sums_c[t], torch.mul(tau, gradient_c, out=total).mul_(lambdas[t]))
            if owned:
                tau.mul_(owns_c[t])
            if coefficient_out is not None:
                products[t].append(torch.dot(masked.reshape(-1), tau.reshape(-1)))
            if owned and logits_c and lambdas is not None:
                total.add_(tau.mul_(masked).mul_(lambdas[t]))
                product.to_logits(tau, [owns_c[t]], [0], [logits_c[num_shared + t]])
            elif not owned and lambdas is not None:
                total.add_(tau, alpha=lambdas[t])
        if logits_c:
            h = total if owned else total.mul_(gradient_c).mul_(mask_c)
            product.to_logits(h, values, range(num_shared) if owned else wanted, logits_c[:num_shared])
        elif sums_c and not owned:
            layout.add_to_mask(sums_c[0], total.mul_(gradient_c))
    if coefficient_out is not None:
        add_products(products, coefficient_out)


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
    """Compute dL/dlogit as `gradients` and then `mask.logit_gradients` would, without storing dL/dM.

    Args: as for `gradients`.

    Returns:
        dL/dlogit of the wanted factors, each of shape S, float32.
    """
    # zeros, since a model that lacks the tensor does not change its own logits
    logits_out = [
        (torch.empty if i < len(mask.factors) else torch.zeros)(base.shape, dtype=torch.float32, device=base.device)
        for i in wanted
    ]
    gradients(
        gradient,
        base,
        models,
        coefficients,
        mask,
        coefficient_out=coefficient_out,
        logits_out=logits_out,
        wanted=wanted,
    )
    return logits_out


def _on_accelerator(
    base: Tensor,
    coefficients: Tensor | None,
    mask: Mask | None,
    coefficient_out: Tensor | None,
    mask_out: Tensor | None,
    wanted: Sequence[int],
) -> bool:
    """Whether the kernels can compute this: they compute all gradients, of all factors, at once."""
    if any(part is None for part in (coefficients, mask, coefficient_out)) or not triton_merge.serves(base, mask):
        return False
    return mask_out is not None or (isinstance(mask, MaskProduct) and tuple(wanted) == tuple(range(len(mask.parts))))


def _factors(
    mask: Mask | None, layout: Layout, *, separately: bool
) -> Iterator[tuple[Tensor | None, Sequence[Tensor]]]:
    """Chunks of the factor of all task vectors; with `separately` also chunks of its own factors."""
    if not separately:
        return ((chunk, ()) for chunk in layout.split_shared(mask))
    assert isinstance(mask, MaskProduct)
    if mask.shared is None:
        return iter([(None, ())] * layout.count)
    return mask.shared.chunks_with_factors(layout.size)


def _by_model(mask_out: Tensor | None, owned: bool) -> Sequence[Tensor]:
    """The outputs for dL/dM: one tensor, or one per model."""
    if mask_out is None:
        return ()
    return list(mask_out) if owned else [mask_out]


def _each(split: Callable[[Tensor], Iterable[Any]], tensors: Sequence[Tensor], count: int) -> Iterator[Sequence[Any]]:
    """Chunks of all tensors together; a () per chunk without tensors."""
    return zip(*map(split, tensors), strict=True) if tensors else iter([()] * count)
