"""Reduce many tensors in a few launches, since a launch on an accelerator costs more than the work on a small tensor.

torch's own optimisers and gradient clipping use the same `_foreach` functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def groups(items: Iterable[Item], most: int, numel: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Group items in their order, each group until it has `most` elements or more; empty items are left out."""
    group: list[Item] = []
    elements = 0
    for item in items:
        if numel(item):
            group.append(item)
            elements += numel(item)
        if elements >= most:
            yield group
            group, elements = [], 0
    if group:
        yield group


def sums_of_sigmoids(logits: Sequence[Tensor]) -> Tensor:
    """sum sigmoid(logit) of each tensor, (n,), float32, as an L1 norm, since sigmoids are positive."""
    return torch.stack(list(torch._foreach_norm(list(torch._foreach_sigmoid(list(logits))), 1)))


def are_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether all elements of each tensor are finite, (n,), bool; a maximum norm keeps NaN. Empty tensors count."""
    return torch.isfinite(torch.stack(list(torch._foreach_norm(list(tensors), torch.inf))))
