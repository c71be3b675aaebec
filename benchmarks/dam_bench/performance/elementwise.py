"""Measure the merge rule against the memory's bandwidth: bytes that it must move, over the time it takes.

The ceiling is a copy of one large tensor to another on the same device, in the same process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dam_bench.performance.clock import environment
from mergekit_dam.merging import triton_merge
from mergekit_dam.merging.mask_product import MaskProduct
from mergekit_dam.merging.rule import gradients, logit_gradients, merge
from mergekit_dam.merging.triton_groups import ElementGroup, Group, Member, RowGroup

_REPEATS = 10
_WIDTH = 2048  # of a row, as in a causal LM of a billion parameters


def measure_elementwise(tasks: int, device: torch.device, numel: int = 1 << 28) -> dict[str, Any]:
    """Time the merge of T models of a bfloat16 matrix under two masks, and the chain rule to the masks' logits.

    Masks have an entry per element, and then one per row.

    Args:
        tasks: T.
        device: an accelerator.
        numel: elements of the matrix, a multiple of 2,048.

    Returns:
        Median seconds and bytes per second of a copy, of both directions by our kernels and without them, and the
        share of the copy's rate that they reach.
    """
    shape = (numel // _WIDTH, _WIDTH)
    base, *models = ((0.1 * torch.randn(shape, device=device)).bfloat16() for _ in range(tasks + 1))
    coefficients, upstream = torch.rand((tasks, 1), device=device), torch.randn(shape, device=device).bfloat16()
    member = Member("matrix", "mask", 0, base, models)
    rates = {"copy": _timed(partial(_copy, *torch.empty((2, *shape), device=device)), 8 * numel, device)}
    for kind, entries in ((ElementGroup, numel), (RowGroup, len(base))):
        mask = MaskProduct(tuple(torch.randn(kind.mask_shape(member), device=device) for _ in range(2)), True)
        frozen = base.element_size() * (tasks + 2) * numel  # theta_0 and theta_t, and theta or dL/dtheta
        sizes = {"merge": frozen + 4 * 2 * entries, "chain": frozen + 4 * (2 + 2) * entries}  # logits, and gradients
        case = _Case(base, models, upstream, mask, coefficients)
        name = "" if kind is ElementGroup else ", rows"
        for ending, group in ((name, kind([member])), (f"{name} without kernels", None)):
            for what, work in (("merge", case.merge), ("chain", case.chain)):
                with mock.patch.object(triton_merge, "serves", lambda base, mask: False):  # which no group asks
                    rates[what + ending] = _timed(partial(work, group), sizes[what], device)
    ceiling = rates["copy"]["bytes_per_second"]
    shares = {name: round(rate["bytes_per_second"] / ceiling, 3) for name, rate in rates.items() if name != "copy"}
    return {
        "tasks": tasks,
        "numel": numel,
        "stored": "bfloat16",
        "rates": rates,
        "share_of_copy": shares,
        "environment": environment(device),
    }


@dataclass
class _Case:
    """A matrix that is merged and differentiated by a group's kernels, or by single operations."""

    base: Tensor
    models: list[Tensor]
    upstream: Tensor
    mask: MaskProduct
    coefficients: Tensor

    def merge(self, group: Group | None) -> object:
        if group is not None:
            return group.merged({"mask": self.mask}, self.coefficients, self.base.dtype)
        return merge(self.base, self.models, self.coefficients[:, 0], self.mask, torch.empty_like(self.base))

    def chain(self, group: Group | None) -> object:
        total = torch.zeros_like(self.coefficients)
        if group is not None:
            return list(group.logit_gradients([self.upstream], {"mask": self.mask}, self.coefficients, total))
        known = self.upstream, self.base, self.models, self.coefficients[:, 0], self.mask
        if self.mask.shape == self.base.shape:
            return logit_gradients(*known, (0, 1), coefficient_out=total[:, 0])
        mask_gradient = torch.zeros(self.mask.shape, device=self.base.device)
        gradients(*known, mask_out=mask_gradient, coefficient_out=total[:, 0])
        return self.mask.logit_gradients(mask_gradient, (0, 1))


def _copy(to: Tensor, of: Tensor) -> None:
    to.copy_(of)


def _timed(work: Callable[[], object], size: int, device: torch.device) -> dict[str, float]:
    seconds = []
    for _ in range(2 + _REPEATS):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])  # the first ones compile and allocate
    return {"seconds": median, "bytes_per_second": size / median}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
