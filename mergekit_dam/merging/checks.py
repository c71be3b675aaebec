"""Refuse NaN and infinity by tensor name, and warn about meaningless masks and task vectors."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_dam.errors import DamError
from mergekit_dam.merging.foreach import are_finite
from mergekit_dam.merging.mask_bytes import to_probabilities

LOG = logging.getLogger(__name__)
_COLLAPSED = 1e-3  # a mask whose mean is nearer than this to 0 or 1 separates no weights
_PIECE = 1 << 17  # elements, which fit into the processor's cache
_OUTLIER = 100.0  # times the median length, from which a task vector is reported
_DAMAGED = "This model is damaged: download or train it again, or leave it out."


def require_finite(tensor: Tensor, name: str, owner: str, cure: str = _DAMAGED) -> None:
    """Refuse a floating tensor, of any shape, that has NaN or infinity.

    Raises:
        DamError: with `name`, `owner` and the number of such elements.
    """
    if tensor.is_floating_point() and not bool(finite_flag(tensor)):
        count = int((~torch.isfinite(tensor)).sum())
        raise DamError(
            f"{name} of {owner}",
            expected="finite weights",
            got=f"{count} of {tensor.numel()} NaN or infinite",
            cure=cure,
        )


def finite_flag(tensor: Tensor) -> Tensor:
    """Whether all elements are finite, as a 0-dim bool on the tensor's device; one pass without a copy."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = tensor.detach().aminmax()  # NaN if any element is
    return torch.isfinite(low) & torch.isfinite(high)


def finite_flags(tensors: Sequence[Tensor]) -> Tensor:
    """`finite_flag` of each tensor, (n,), in few launches on an accelerator."""
    if tensors[0].device.type == "cpu":
        return torch.stack([finite_flag(tensor) for tensor in tensors])
    return are_finite(tensors)


def require_flags(names: Sequence[str], flags_N: Tensor, step: int) -> None:
    """Refuse a step in which a gradient was not finite (`finite_flags`); it waits for the device once.

    Raises:
        DamError: with the first such tensor and the step.
    """
    if bool(flags_N.all()):
        return
    raise DamError(
        f"gradient of {names[flags_N.tolist().index(False)]} at step {step}",
        expected="finite numbers",
        got="NaN or infinity",
        cure="Lower mask_learning_rate or the models' weight; nothing of this step is kept.",
    )


def warn_about_masks(probabilities: Mapping[str, Mapping[str, Tensor]], coefficients: Tensor) -> list[str]:
    """Log and return `mask_faults`."""
    faults = mask_faults(probabilities, coefficients)
    for line in faults:
        LOG.warning("dam: %s", line)
    return faults


def mask_faults(probabilities: Mapping[str, Mapping[str, Tensor]], coefficients: Tensor) -> list[str]:
    """Describe faults that make learned masks meaningless: a mask all 0 or all 1, or coefficients all 0.

    Args:
        probabilities: mask name -> tensor name -> probabilities of any shape, or their bytes.
        coefficients: lambda, (T, 1) or (T, P).
    """
    faults = []
    for mask, by_name in probabilities.items():
        sums = {name: _sum(values) for name, values in by_name.items()}
        kept = math.fsum(sums.values())
        units = sum(values.numel() for values in by_name.values())
        if not units:
            continue
        mean = kept / units
        if mean < _COLLAPSED:
            faults.append(f"mask {mask} has collapsed to 0 (mean {mean:.2g}): it separates no weights")
        elif mean > 1 - _COLLAPSED:
            faults.append(f"mask {mask} has collapsed to 1 (mean {mean:.6g}): it removes nothing")
        dead = [name for name, values in by_name.items() if sums[name] < _COLLAPSED * values.numel()]
        if dead and mean >= _COLLAPSED:
            faults.append(f"mask {mask} is 0 in {len(dead)} of {len(by_name)} tensors (first: {dead[0]})")
    if not bool(coefficients.any()):
        faults.append("all merging coefficients are 0: the merge is theta_0")
    return faults


def _sum(values: Tensor) -> float:
    """Sum probabilities in pieces that fit into the cache; a whole float32 copy would take twice the masks."""
    return math.fsum(float(to_probabilities(part).sum()) for part in values.reshape(-1).split(_PIECE))


def warn_about_task_vectors(names: Sequence[str], norms: Sequence[float]) -> list[str]:
    """Log and return warnings about models that equal theta_0 or are much farther from it than the median model.

    Args:
        names: of the T models.
        norms: L2 norm of each model's whole task vector.
    """
    median = sorted(norms)[(len(norms) - 1) // 2]
    warnings = []
    for name, norm in zip(names, norms, strict=True):
        if norm == 0.0:
            warnings.append(f"model {name} equals theta_0 in every shared tensor: it adds nothing")
        elif median > 0.0 and norm > _OUTLIER * median:
            warnings.append(f"model {name} is {norm / median:.3g} times as far from theta_0 as the median model")
        elif not math.isfinite(norm):
            warnings.append(f"model {name} is too far from theta_0 to measure")
    for line in warnings:
        LOG.warning("dam: %s", line)
    return warnings
