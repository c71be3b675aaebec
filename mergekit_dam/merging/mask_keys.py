"""Define names, shapes and keys of masks, for the files of a merge, the equation and learning."""

from __future__ import annotations

from typing import Literal

import torch

Granularity = Literal["element", "row"]
TASK_SHARED, BACKDOOR_DETECTION = "task_shared", "backdoor_detection"


def mask_shape(shape: torch.Size | tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Shape of a mask that broadcasts to a tensor of `shape`: all, or one entry per row (dim 0)."""
    if granularity == "element" or len(shape) == 0:
        return tuple(shape)
    return (shape[0], *[1] * (len(shape) - 1))


def own_key(model: int, name: str) -> str:
    """Key of a tensor in a mask of which each model has its own."""
    return f"{model}.{name}"


def owned_name(key: str) -> str:
    """Tensor name in an `own_key`."""
    return key.partition(".")[2]
