"""NaN and infinity named where they arise; masks and task vectors that say nothing reported."""

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
_COLLAPSED = 1e-3  # a mask whose mean is nearer than this to 0 or 1 decides nothing
_PIECE = 1 << 17  # elements
_OUTLIER = 100.0  # a task vector so many times longer than the median one
_DAMAGED = "This model is damaged: download or train it again, or leave it out."


def require_finite(tensor: Tensor, name: str, owner: str, cure: str = _DAMAGED) -> None:
    """Refuse a floating tensor of any shape with NaN or infinity in it.

    Raises:
        DamError: `name` of `owner`, and how many of its elements.
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
    """Whether all elements are finite: 0-dim bool on the tensor's device, from one pass that copies nothing."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = tensor.detach().aminmax()  # NaN wins
    return torch.isfinite(low) & torch.isfinite(high)


def finite_flags(tensors: Sequence[Tensor]) -> Tensor:
    """`finite_flag` of each, (n,); a few launches in all on an accelerator."""
    if tensors[0].device.type == "cpu":
        return torch.stack([finite_flag(tensor) for tensor in tensors])
    return are_finite(tensors)


def require_finite_gradients(gradients: Mapping[str, Tensor | None], what: str, step: int) -> None:
    """Refuse NaN or infinity in gradients by name.

    Raises:
        DamError: the first tensor concerned, and the step.
    """
    found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    if found:
        require_flags([f"{what} for {name}" for name in found], finite_flags(list(found.values())), step)


def require_flags(names: Sequence[str], flags_N: Tensor, step: int) -> None:
    """Refuse a step in which some gradient was not finite (`finite_flags`); one wait for the device in all.

    Raises:
        DamError: the first tensor concerned, and the step.
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
    """Log, and return, `mask_faults`."""
    found = mask_faults(probabilities, coefficients)
    for line in found:
        LOG.warning("dam: %s", line)
    return found


def mask_faults(probabilities: Mapping[str, Mapping[str, Tensor]], coefficients: Tensor) -> list[str]:
    """What makes learned masks meaningless: a mask all 0 or all 1, or coefficients all 0.

    Args:
        probabilities: mask name -> tensor name -> probabilities of any shape, or their bytes.
        coefficients: lambda, (T, 1) or (T, P).
    """
    found = []
    for mask, by_name in probabilities.items():
        sums = {name: _sum(values) for name, values in by_name.items()}
        kept = math.fsum(sums.values())
        units = sum(values.numel() for values in by_name.values())
        if not units:
            continue
        mean = kept / units
        if mean < _COLLAPSED:
            found.append(f"mask {mask} has collapsed to 0 (mean {mean:.2g}): it tells no weights apart")
        elif mean > 1 - _COLLAPSED:
            found.append(f"mask {mask} has collapsed to 1 (mean {mean:.6g}): it takes nothing out")
        dead = [name for name, values in by_name.items() if sums[name] < _COLLAPSED * values.numel()]
        if dead and mean >= _COLLAPSED:
            found.append(f"mask {mask} is 0 in {len(dead)} of {len(by_name)} tensors (first: {dead[0]})")
    if not bool(coefficients.any()):
        found.append("all merging coefficients are 0: the merge is theta_0")
    return found


def _sum(values: Tensor) -> float:
    """In pieces that stay in the processor's cache, for a copy in float32 of all is as large as the masks twice."""
    return math.fsum(float(to_probabilities(part).sum()) for part in values.reshape(-1).split(_PIECE))


def warn_about_task_vectors(names: Sequence[str], norms: Sequence[float]) -> list[str]:
    """Log, and return, models equal to theta_0 and models that drown the others.

    Args:
        names: of the T models.
        norms: L2 norm of each one's whole task vector.
    """
    middle = sorted(norms)[(len(norms) - 1) // 2]
    found = []
    for name, norm in zip(names, norms, strict=True):
        if norm == 0.0:
            found.append(f"model {name} equals theta_0 in every shared tensor: it adds nothing")
        elif middle > 0.0 and norm > _OUTLIER * middle:
            found.append(f"model {name} is {norm / middle:.3g} times as far from theta_0 as the median model")
        elif not math.isfinite(norm):
            found.append(f"model {name} is too far from theta_0 to measure")
    for line in found:
        LOG.warning("dam: %s", line)
    return found
