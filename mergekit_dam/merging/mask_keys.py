"""Define names, shapes and keys of masks, for the files of a merge, the equation and learning."""

from __future__ import annotations

from typing import Literal

import torch

Granularity = Literal["element", "row", "tensor"]
TASK_SHARED, BACKDOOR_DETECTION = "task_shared", "backdoor_detection"


def mask_shape(shape: torch.Size | tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Shape of a mask that broadcasts to a tensor of `shape`: all, one entry per row (dim 0), or one."""
    if granularity == "element":
        return tuple(shape)
    if granularity == "row" and len(shape) > 0:
        return (shape[0], *[1] * (len(shape) - 1))
    return (1,) * len(shape)


def table_granularity(granularity: Granularity) -> Granularity:
    """What one mask entry covers of a table with a row per token where a row shall have one entry at most."""
    return "row" if granularity == "element" else granularity


def own_key(model: int, name: str) -> str:
    """Key of a tensor in a mask of which each model has its own."""
    return f"{model}.{name}"


def owned_name(key: str) -> str:
    """Tensor name in an `own_key`."""
    return key.partition(".")[2]
