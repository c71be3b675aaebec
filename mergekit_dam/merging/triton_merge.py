"""The merge rule on an accelerator: one kernel per tensor that reads each of its inputs once (Triton).

Same arithmetic as rule.py's, which serves everything that these kernels do not: masks of rows (but for groups of
tensors, triton_groups.py) or of whole tensors, rescaled masks, and devices without Triton. There each operation is a
kernel of its own that reads and writes whole tensors, 6 T + 4 passes through memory for a merge of T models instead
of T + 4, and costs a launch.
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
    """Whether there are kernels for this device; they take coefficients from its memory."""
    return triton_kernels is not None and device.type == "cuda"


def warn_without_kernels(device: torch.device) -> None:
    """Say so once where an accelerator could have them."""
    if triton_kernels is None and device.type == "cuda":
        LOG.warning(
            "dam: without Triton the merge rule takes about ten times as long on this device: "
            "pip install 'mergekit-dam[kernels]'"
        )


def serves(base: Tensor, mask: Tensor | MaskProduct | None) -> bool:
    """Whether the kernels can do this tensor's work."""
    if not runs_on(base.device) or not base.numel():
        return False
    if isinstance(mask, MaskProduct) and not mask.separate:
        return False
    return mask is None or mask.shape == base.shape


def on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are started on this device, whatever the current one is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def element_type(dtype: torch.dtype) -> Any:
    """What a kernel calls this type."""
    return triton_kernels.TYPES[str(dtype).removeprefix("torch.")]


def merge(
    base: Tensor, models: Sequence[Tensor | None], coefficients: Tensor, mask: Tensor | MaskProduct | None, out: Tensor
) -> None:
    """theta = theta_0 + M o sum_t lambda_t tau_t into `out`; arguments as `rule.merge` has them."""
    present, lambdas = _present(models, coefficients.to(out.device))
    factors, owns, logits = _factors(mask, models)
    grid = (-(-base.numel() // BLOCK),)
    with on(out.device):
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
    """dL/dlambda, added to `coefficient_out`, and dL/dM, added to `mask_out`, or dL/dlogit into `logits_out`.

    Args:
        gradient: dL/dtheta, shape S, any floating type.
        base, models: theta_0 and theta_t, each of shape S or None.
        coefficients: lambda, (T,).
        mask: M, of shape S; a product of logits for `logits_out`.
        coefficient_out: (T,), float32.
        mask_out: shape S, or (T, *S) where models have factors of their own, contiguous, float32.
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
            out.zero_()  # a model that lacks the tensor leaves its logits as they are
    else:
        outs = tuple(logits_out) if mask_out is None else (mask_out,)
    temperature = mask.temperature if isinstance(mask, MaskProduct) else 1.0
    with on(base.device):
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
    """The models that have the tensor, and their coefficients."""
    present = tuple(model.contiguous() for model in models if model is not None)
    if len(present) == len(models):
        return present, coefficients
    return present, coefficients[[t for t, model in enumerate(models) if model is not None]]


def _factors(
    mask: Tensor | MaskProduct | None, models: Sequence[Tensor | None]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], bool]:
    """What M is the product of, the own factors of the models that have the tensor, and whether these are logits."""
    if mask is None:
        return (), (), False
    if not isinstance(mask, MaskProduct):
        return (mask.contiguous(),), (), False
    owns = [own for own, model in zip(mask.own, models, strict=True) if model is not None] if mask.own else []
    return tuple(map(_readable, mask.factors)), tuple(map(_readable, owns)), mask.logits


def _readable(factor: Tensor) -> Tensor:
    return (to_probabilities(factor) if factor.dtype == torch.uint8 else factor).contiguous()
