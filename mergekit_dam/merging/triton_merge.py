"""Compute the merge rule on an accelerator, with one Triton kernel per tensor that reads each input once.

The arithmetic is that of rule.py, which handles the cases that these kernels do not: masks of rows (except in groups
of tensors, triton_groups.py) or of whole tensors, rescaled masks, and devices without Triton. There each operation is
a separate kernel that reads and writes whole tensors and costs a launch: 6 T + 4 passes through memory for a merge of
T models, where one kernel makes T + 4.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.merging.mask_bytes import to_probabilities
from mergekit_dam.merging.mask_product import MaskProduct, has_own

try:
    from mergekit_dam.merging import triton_kernels as triton_kernels
except ImportError:  # PyTorch brings Triton along where it brings CUDA or ROCm
    triton_kernels = None  # type: ignore[assignment]

LOG = logging.getLogger(__name__)
BLOCK = 1024  # elements per program


def runs_on(device: torch.device) -> bool:
    """Whether there are kernels for this device; they read coefficients from its memory."""
    return triton_kernels is not None and device.type == "cuda"


def warn_without_kernels(device: torch.device) -> None:
    """Warn if Triton is missing on a device that it supports."""
    if triton_kernels is None and device.type == "cuda":
        LOG.warning(
            "dam: without Triton the merge rule takes about ten times as long on this device: "
            "pip install 'mergekit-dam[kernels]'"
        )


def serves(base: Tensor, mask: Tensor | MaskProduct | None) -> bool:
    """Whether the kernels support this tensor and mask."""
    if not runs_on(base.device) or not base.numel():
        return False
    if isinstance(mask, MaskProduct) and not mask.separate:
        return False
    return mask is None or mask.shape == base.shape


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make this the current device, on which kernels are started."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def element_type(dtype: torch.dtype) -> Any:
    """The Triton type of a torch type."""
    return triton_kernels.TYPES[str(dtype).removeprefix("torch.")]


def merge(
    base: Tensor, models: Sequence[Tensor | None], coefficients: Tensor, mask: Tensor | MaskProduct | None, out: Tensor
) -> None:
    """Write theta = theta_0 + M o sum_t lambda_t tau_t to `out`; arguments as for `rule.merge`."""
    present, lambdas = _present(models, coefficients.to(out.device))
    factors, owns, logits = _factors(mask, models)
    grid = (-(-base.numel() // BLOCK),)
    with on_device(out.device):
        triton_kernels.merge[grid](
            out,
            base.contiguous(),
            present,
            lambdas,
            lambdas.stride(0),
            factors,
            owns,
            base.numel(),
            logits,
            has_own(mask),
            BLOCK,
        )


def gradients(
    gradient: Tensor,
    base: Tensor,
    models: Sequence[Tensor | None],
    coefficients: Tensor,
    mask: Tensor | MaskProduct | None,
    *,
    coefficient_out: Tensor,
    mask_out: Tensor | None = None,
    logits_out: Sequence[Tensor] = (),
) -> None:
    """Add dL/dlambda to `coefficient_out`, and add dL/dM to `mask_out` or write dL/dlogit to `logits_out`.

    Args:
        gradient: dL/dtheta, shape S, any floating type.
        base, models: theta_0 and theta_t, each of shape S or None.
        coefficients: lambda, (T,).
        mask: M, of shape S; a product of logits for `logits_out`.
        coefficient_out: (T,), float32.
        mask_out: shape S, or (T, *S) where models have own factors, contiguous, float32.
        logits_out: for each of the mask's `parts`, shape S, contiguous, float32.
    """
    present, lambdas = _present(models, coefficients.to(base.device))
    factors, owns, logits = _factors(mask, models)
    programs = -(-base.numel() // BLOCK)
    # summed in a fixed order afterwards: atomic additions would make runs differ
    products = torch.empty((max(1, len(present)), programs), dtype=torch.float32, device=base.device)
    if has_own(mask):
        every = logits_out[len(factors) :] if mask_out is None else mask_out
        outs = (*logits_out[: len(factors)], *(o for o, m in zip(every, models, strict=True) if m is not None))
        for out in (o for o, m in zip(logits_out[len(factors) :], models, strict=False) if m is None):
            out.zero_()  # a model that lacks the tensor does not change its logits
    else:
        outs = tuple(logits_out) if mask_out is None else (mask_out,)
    temperature = mask.temperature if isinstance(mask, MaskProduct) else 1.0
    with on_device(base.device):
        triton_kernels.gradients[(programs,)](
            gradient.contiguous(),
            base.contiguous(),
            present,
            lambdas,
            lambdas.stride(0),
            factors,
            owns,
            outs,
            products,
            base.numel(),
            programs,
            1.0 / temperature,
            logits,
            mask_out is None,
            has_own(mask),
            BLOCK,
        )
    sums = products[: len(present)].sum(1)
    if len(present) == len(models):
        coefficient_out.add_(sums)
    else:
        coefficient_out[[t for t, model in enumerate(models) if model is not None]] += sums


def _present(models: Sequence[Tensor | None], coefficients: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Select the models that have the tensor, and their coefficients."""
    present = tuple(model.contiguous() for model in models if model is not None)
    if len(present) == len(models):
        return present, coefficients
    return present, coefficients[[t for t, model in enumerate(models) if model is not None]]


def _factors(
    mask: Tensor | MaskProduct | None, models: Sequence[Tensor | None]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], bool]:
    """Return the shared factors of M, the own factors of models that have the tensor, and whether they are logits."""
    if mask is None:
        return (), (), False
    if not isinstance(mask, MaskProduct):
        return (mask.contiguous(),), (), False
    owns = [own for own, model in zip(mask.own, models, strict=True) if model is not None] if mask.own else []
    return tuple(map(_readable, mask.factors)), tuple(map(_readable, owns)), mask.logits


def _readable(factor: Tensor) -> Tensor:
    return (to_probabilities(factor) if factor.dtype == torch.uint8 else factor).contiguous()
