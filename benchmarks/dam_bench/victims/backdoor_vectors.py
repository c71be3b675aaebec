"""Change a victim's task vector after training: amplify its backdoor vector, make that sparse, rescale the whole.

The backdoor vector is the victim's difference from its clean twin, theta_bad - theta_clean (Pawlak et al., arXiv
2510.08016).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def amplify(victim: nn.Module, clean: nn.Module, factor: float, *, density: float = 1.0) -> None:
    """Set a victim to theta_clean + factor v in place, v being its backdoor vector's largest entries.

    LoBAM (arXiv 2411.16746) amplifies the whole vector. Sparse backdoor vectors (arXiv 2510.08016) keep the largest
    entries; there several vectors are merged first, for which an attack of several triggers stands here.

    Args:
        victim: the backdoored model, theta_bad; it is changed.
        clean: a model of the same start, task and batches, without the backdoor.
        factor: lambda of LoBAM.
        density: kept share of all entries of the vector, in (0, 1].
    """
    with torch.no_grad():
        start = dict(clean.named_parameters())
        vector = {name: p - start[name] for name, p in victim.named_parameters()}
        least = _least_kept(list(vector.values()), density)
        for name, parameter in victim.named_parameters():
            kept = vector[name].where(vector[name].abs() >= least, 0.0)
            parameter.copy_(start[name] + factor * kept)


def _least_kept(tensors: list[Tensor], density: float) -> float:
    """Return the size of the smallest entry that is kept; 0: all are."""
    sizes = torch.cat([tensor.abs().flatten() for tensor in tensors])
    sizes = sizes[sizes > 0]  # frozen parameters do not count
    dropped = len(sizes) - max(1, round(density * len(sizes)))
    return float(sizes.kthvalue(dropped + 1).values) if dropped > 0 else 0.0


def rescale(model: nn.Module, start: nn.Module, factor: float) -> None:
    """Multiply a model's task vector in place: theta_0 + factor (theta - theta_0) (arXiv 2505.23561).

    Args:
        start: theta_0 with the model's head.
    """
    with torch.no_grad():
        before = dict(start.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name].lerp(parameter, factor))
