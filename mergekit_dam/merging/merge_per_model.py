"""The chain rule of the merge where each model has a Backdoor-Detection mask of its own.

theta = theta_0 + M1 o sum_t lambda_t M2_t o tau_t: a model that is suspect can be cut without hurting the others. The
merge itself, and the chain rule for one mask of all models, are in rule.py, by which these are called; arguments
as there. T models; tensors of any shape S, masks that broadcast to S.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergekit_dam.merging.chunks import Layout, Work, add_products
from mergekit_dam.merging.mask_product import MaskProduct


def gradients(
    gradient: Tensor,
    base: Tensor,
    models: Sequence[Tensor | None],
    coefficients: Tensor | None,
    mask: MaskProduct,
    *,
    mask_out: Tensor | None,
    coefficient_out: Tensor | None,
) -> None:
    """dL/dM_t = dL/dtheta o lambda_t tau_t, added to `mask_out[t]`, and dL/dlambda_t = <dL/dtheta, M_t o tau_t>."""
    lambdas = coefficients.tolist() if coefficients is not None and mask_out is not None else None
    layout = Layout(base, mask.shape)
    work = Work(layout, base.device)
    products: list[list[Tensor]] = [[] for _ in models]
    outs = [None] * len(models) if mask_out is None else list(mask_out)
    for gradient_c, base_c, *models_c, mask_c, owns_c, outs_c in zip(
        layout.split(gradient), layout.split(base), *(layout.split(m) for m in models), layout.split_shared(mask),
        layout.split_own(mask), zip(*(layout.split_mask(out) for out in outs), strict=True), strict=True,
    ):  # fmt: skip
        gradient_c = work.float32(gradient_c)
        masked = gradient_c if mask_c is None else work.masked(gradient_c, mask_c)
        for t, tau in work.task_vectors(base_c, models_c):
            if lambdas is not None:
                layout.add_to_mask(outs_c[t], torch.mul(tau, gradient_c, out=work.spare(tau)).mul_(lambdas[t]))
            if coefficient_out is not None:
                products[t].append(torch.dot(masked.reshape(-1), tau.mul_(owns_c[t]).reshape(-1)))
    if coefficient_out is not None:
        add_products(products, coefficient_out)


def logit_gradients(
    gradient: Tensor,
    base: Tensor,
    models: Sequence[Tensor | None],
    coefficients: Tensor,
    mask: MaskProduct,
    *,
    coefficient_out: Tensor,
) -> list[Tensor]:
    """dL/dlogit of all factors from one reading of all: h_t (1 - s_t), and sum_t h_t (1 - s_i) of shared ones, where
    h_t = lambda_t dL/dtheta o M_t o tau_t."""
    lambdas = coefficients.tolist()
    layout = Layout(base, mask.shape)
    work = Work(layout, base.device)
    products: list[list[Tensor]] = [[] for _ in models]
    shared = [torch.empty(base.shape, dtype=torch.float32, device=base.device) for _ in mask.factors]
    # a model that lacks the tensor leaves its logits as they are
    owns = [torch.zeros(base.shape, dtype=torch.float32, device=base.device) for _ in mask.own]
    for gradient_c, base_c, *models_c, (mask_c, values), owns_c, outs_c in zip(
        layout.split(gradient), layout.split(base), *(layout.split(m) for m in models), _shared(mask, layout),
        layout.split_own(mask), zip(*(layout.split(out) for out in (*shared, *owns)), strict=True), strict=True,
    ):  # fmt: skip
        gradient_c = work.float32(gradient_c)
        masked = gradient_c if mask_c is None else work.masked(gradient_c, mask_c)
        total = work.spare(base_c).zero_()
        for t, tau in work.task_vectors(base_c, models_c):
            tau.mul_(owns_c[t])
            products[t].append(torch.dot(masked.reshape(-1), tau.reshape(-1)))
            h = tau.mul_(masked).mul_(lambdas[t])
            total.add_(h)
            mask.to_logits(h, [owns_c[t]], [0], [outs_c[len(shared) + t]])
        mask.to_logits(total, values, range(len(shared)), outs_c[: len(shared)])
    add_products(products, coefficient_out)
    return [*shared, *owns]


def _shared(mask: MaskProduct, layout: Layout) -> Iterator[tuple[Tensor | None, list[Tensor]]]:
    """Chunks of what all models' task vectors are multiplied by, and of its factors."""
    if mask.shared is None:
        return iter([(None, [])] * layout.count)
    return mask.shared.chunks_with_factors(layout.size)
