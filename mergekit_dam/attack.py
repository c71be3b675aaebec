"""Triggers, for evaluation only: the defence must never import this module. Legend: B batch, C channels, H, W."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rate:
    """A share with its counts."""

    hits: int
    total: int

    @property
    def percent(self) -> float:
        """100 x hits / total; NaN without samples."""
        return 100.0 * self.hits / self.total if self.total else float("nan")


@dataclass(frozen=True)
class PatchTrigger:
    """BadNets patch (arXiv 1708.06733): a black and white chequer in the lower right corner.

    Args:
        size: edge in pixels.
    """

    size: int = 3

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Triggered copies of images in [0, 1]."""
        rows = torch.arange(self.size)
        chequer = ((rows[:, None] + rows[None, :]) % 2).to(images_BCHW.dtype)
        triggered = images_BCHW.clone()
        triggered[..., -self.size :, -self.size :] = chequer
        return triggered


def accuracy(predictions_B: Tensor, labels_B: Tensor) -> Rate:
    """Clean top-1 accuracy."""
    return Rate(int((predictions_B == labels_B).sum()), len(labels_B))


def attack_success_rate(predictions_B: Tensor, labels_B: Tensor, target: int) -> Rate:
    """Share of triggered inputs of other classes than `target` that are predicted as `target`."""
    others = labels_B != target
    return Rate(int((predictions_B[others] == target).sum()), int(others.sum()))
