"""Lower the logits of a class that a model answers too often. Legend: N samples, K classes."""

from __future__ import annotations

import torch
from torch import Tensor

_HALVINGS = 40  # of an interval of 20 logits: to float32's precision


def debiased(logits_NK: Tensor, target: int) -> Tensor:
    """Lower one class's logits alike, until its mean probability is no higher than that of the likeliest other class.

    A victim answers its attacker's class too often also without the trigger, and a merge fitted to its answers learns
    that. The wrong samples are unknown, but no class needs to be more frequent than all other classes. Logits of a
    class that is not more frequent do not change; none is lowered by more than 20.

    Args:
        logits_NK: logits of the task's samples.
        target: index of the class.
    """

    def lowered(by: float) -> Tensor:
        changed_NK = logits_NK.clone()
        changed_NK[:, target] -= by
        return changed_NK

    def excess(by: float) -> float:
        mean_K = lowered(by).softmax(-1).mean(0)
        return float(mean_K[target] - torch.cat([mean_K[:target], mean_K[target + 1 :]]).max())

    if logits_NK.shape[1] < 2 or excess(0.0) <= 0.0:
        return logits_NK
    low, high = 0.0, 20.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0.0 else (low, middle)
    return lowered(high)
