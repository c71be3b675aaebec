"""The merge equation, once: theta = theta_0 + M o sum_t lambda_t (theta_t - theta_0), and its chain rule.

Source: DAM (arXiv 2410.13910), with M = M1 o M2 one mask for all models; or each model's tau_t has an M2 of its own,
theta = theta_0 + M1 o sum_t lambda_t M2_t o tau_t (chain rule: merge_per_model.py). The streaming merge and the
learning loop both call `merge`, so that they agree bit for bit. T models; tensors of any shape S, masks that broadcast
to S, coefficients (T,). Everything is computed in float32 and elementwise, hence commutes with sharding.

All of it runs over chunks that stay in the processor's cache: each tensor is read once, and no intermediate result of
a tensor's size exists. On accelerators kernels of our own do the same where they can (triton_merge.py); elsewhere a
chunk is large there, for the number of kernels counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_dam.merging import merge_per_model, triton_merge
from mergekit_dam.merging.chunks import Layout, Mask, Work, add_products
from mergekit_dam.merging.mask_product import MaskProduct, has_own


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
    if triton_merge.serves(base, mask):
        triton_merge.merge(base, models, coefficients, mask, out)
        return out
    lambdas = coefficients.tolist()
    layout = Layout(base, mask.shape if mask is not None else base.shape)
    work = Work(layout, base.device)
    for base_c, *models_c, out_c, mask_c, owns_c in zip(
        layout.split(base), *(layout.split(m) for m in models), layout.split(out), layout.split_shared(mask),
        layout.split_own(mask), strict=True,
    ):  # fmt: skip
        total = work.total(base_c, models_c, lambdas, owns=owns_c)
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
        mask: M, needed for `coefficient_out` and where models have factors of their own; None keeps everything.
        mask_out: contiguous, float32, of M's `gradient_shape`.
        coefficient_out: (T,), float32.
    """
    everything = all(part is not None for part in (coefficients, mask, mask_out, coefficient_out))
    if everything and triton_merge.serves(base, mask):
        assert coefficients is not None and coefficient_out is not None
        triton_merge.gradients(
            gradient, base, models, coefficients, mask, coefficient_out=coefficient_out, mask_out=mask_out
        )
        return
    if has_own(mask):
        merge_per_model.gradients(
            gradient, base, models, coefficients, mask, mask_out=mask_out, coefficient_out=coefficient_out
        )
        return
    lambdas = coefficients.tolist() if coefficients is not None and mask_out is not None else None
    shape = mask_out.shape if mask_out is not None else mask.shape if mask is not None else base.shape
    layout = Layout(base, shape)
    work = Work(layout, base.device)
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
    """`gradients` and then `mask.logit_gradients`, without dL/dM in between: the same values from one reading of all.

    Args:
        gradient: dL/dtheta, shape S, any floating type.
        coefficients: lambda (T,).
        mask: M, of shape S and not rescaled (`mask.separate`).
        wanted: indices of its `parts`; all of them where models have factors of their own.
        coefficient_out: (T,), float32; dL/dlambda is added to it.

    Returns:
        dL/dlogit of the wanted factors, each of shape S, float32.
    """
    if triton_merge.serves(base, mask) and tuple(wanted) == tuple(range(len(mask.parts))):
        found = [torch.empty(base.shape, dtype=torch.float32, device=base.device) for _ in wanted]
        triton_merge.gradients(
            gradient, base, models, coefficients, mask, coefficient_out=coefficient_out, logits_out=found
        )
        return found
    if has_own(mask):
        return merge_per_model.logit_gradients(
            gradient, base, models, coefficients, mask, coefficient_out=coefficient_out
        )
    lambdas = coefficients.tolist()
    layout = Layout(base, mask.shape)
    work = Work(layout, base.device)
    products: list[list[Tensor]] = [[] for _ in models]
    found = [torch.empty(base.shape, dtype=torch.float32, device=base.device) for _ in wanted]
    for gradient_c, base_c, *models_c, (mask_c, values), outs_c in zip(
        layout.split(gradient), layout.split(base), *(layout.split(m) for m in models),
        mask.chunks_with_factors(layout.size), zip(*(layout.split(out) for out in found), strict=True), strict=True,
    ):  # fmt: skip
        gradient_c = work.float32(gradient_c)
        total = work.total(base_c, models_c, lambdas, work.masked(gradient_c, mask_c), products)
        mask.to_logits(total.mul_(gradient_c).mul_(mask_c), values, wanted, outs_c)
    add_products(products, coefficient_out)
    return found
