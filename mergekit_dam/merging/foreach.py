"""Reductions of many tensors in a few launches, for accelerators, where a call costs more than a small tensor's work.

torch's `_foreach` functions are what its own optimisers and gradient clipping are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def groups(items: Iterable[Item], most: int, numel: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items in their order, together until they have `most` elements or more; the empty ones left out."""
    group: list[Item] = []
    held = 0
    for item in items:
        if numel(item):
            group.append(item)
            held += numel(item)
        if held >= most:
            yield group
            group, held = [], 0
    if group:
        yield group


def sums_of_sigmoids(logits: Sequence[Tensor]) -> Tensor:
    """sum sigmoid(logit) of each tensor, (n,), float32: the L1 norm of what is not negative is its sum."""
    return torch.stack(list(torch._foreach_norm(list(torch._foreach_sigmoid(list(logits))), 1)))


def are_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether all elements of each tensor are finite, (n,), bool; in a maximum NaN wins. Empty tensors are."""
    return torch.isfinite(torch.stack(list(torch._foreach_norm(list(tensors), torch.inf))))
