"""The merge equation, once: theta = theta_0 + M o sum_t lambda_t (theta_t - theta_0).

Source: DAM (arXiv 2410.13910), with M = M1 o M2 one mask for all models. The streaming merge and the learning
loop both call `merge`, so that they agree bit for bit. T models; tensors of any shape S, masks that broadcast
to S, coefficients (T,). Everything is computed in float32 and elementwise, hence commutes with sharding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def task_vector(base: Tensor, model: Tensor) -> Tensor:
    """tau_t = theta_t - theta_0 in float32 (arXiv 2212.04089)."""
    return model.to(torch.float32) - base.to(torch.float32)


def weighted_task_vectors(base: Tensor, models: Sequence[Tensor | None], coefficients: Tensor) -> Tensor:
    """sum_t lambda_t tau_t, shape S, float32. A model that lacks the tensor (None) adds nothing."""
    total = torch.zeros(base.shape, dtype=torch.float32, device=base.device)
    for model, coefficient in zip(models, coefficients, strict=True):
        if model is not None:
            total.addcmul_(task_vector(base, model), coefficient)
    return total


def merge(base: Tensor, models: Sequence[Tensor | None], coefficients: Tensor, mask: Tensor | None) -> Tensor:
    """theta, shape S, float32.

    Args:
        base: theta_0, shape S, any floating type.
        models: theta_t, each of shape S or None.
        coefficients: lambda, shape (T,), float32.
        mask: M, broadcastable to S, float32; None keeps everything.
    """
    total = weighted_task_vectors(base, models, coefficients)
    if mask is not None:
        total.mul_(mask)
    return total.add_(base.to(torch.float32))


def mask_gradient(
    gradient: Tensor, base: Tensor, models: Sequence[Tensor | None], coefficients: Tensor, mask_shape: torch.Size
) -> Tensor:
    """dL/dM = dL/dtheta o sum_t lambda_t tau_t, summed over what one mask entry covers."""
    return (gradient * weighted_task_vectors(base, models, coefficients)).sum_to_size(mask_shape)


def coefficient_gradient(
    gradient: Tensor, base: Tensor, models: Sequence[Tensor | None], mask: Tensor | None
) -> Tensor:
    """dL/dlambda_t = <dL/dtheta, M o tau_t>, shape (T,)."""
    masked = gradient if mask is None else gradient * mask
    parts = [masked.new_zeros(()) if model is None else (masked * task_vector(base, model)).sum() for model in models]
    return torch.stack(parts)
