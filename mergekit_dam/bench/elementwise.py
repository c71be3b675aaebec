"""How near the merge rule comes to the memory's bandwidth: bytes that it must move, over the time it takes.

The ceiling is a copy of one large tensor to another on the same device, in the same process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mergekit_dam import fused
from mergekit_dam.bench.gauges import environment
from mergekit_dam.mask_product import MaskProduct
from mergekit_dam.merge_rule import logit_gradients, merge

_REPEATS = 10


def measure_elementwise(tasks: int, device: torch.device, numel: int = 1 << 28) -> dict[str, Any]:
    """T models of one bfloat16 tensor merged under two masks, and the chain rule back to their logits.

    Args:
        tasks: T.
        device: where.
        numel: elements of the tensor.

    Returns:
        Median seconds and bytes per second of a copy, of both directions by our kernels and without them, and the
        share of the copy's rate that they reach.
    """
    base, *models = ((0.1 * torch.randn(numel, device=device)).bfloat16() for _ in range(tasks + 1))
    mask = MaskProduct(tuple(torch.randn(numel, device=device) for _ in range(2)), True)
    coefficients, upstream = torch.rand(tasks, device=device), torch.randn(numel, device=device).bfloat16()
    out, total = torch.empty_like(base), torch.zeros(tasks, device=device)
    spare = torch.empty(numel, device=device)
    forward = base.element_size() * (tasks + 2) + 4 * 2  # theta_0, theta_t, theta, two logits
    backward = base.element_size() * (tasks + 2) + 4 * 2 + 4 * 2  # dL/dtheta for theta, and two gradients written

    def chain() -> list[Tensor]:
        return logit_gradients(upstream, base, models, coefficients, mask, (0, 1), coefficient_out=total)

    found: dict[str, dict[str, float]] = {}
    found["copy"] = _timed(lambda: spare.copy_(mask.factors[0]), 8 * numel, device)
    found["merge"] = _timed(lambda: merge(base, models, coefficients, mask, out), forward * numel, device)
    found["chain"] = _timed(chain, backward * numel, device)
    with mock.patch.object(fused, "serves", lambda base, mask: False):
        found["merge without kernels"] = _timed(
            lambda: merge(base, models, coefficients, mask, out), forward * numel, device
        )
        found["chain without kernels"] = _timed(chain, backward * numel, device)
    ceiling = found["copy"]["bytes_per_second"]
    shares = {name: round(one["bytes_per_second"] / ceiling, 3) for name, one in found.items() if name != "copy"}
    return {
        "tasks": tasks, "numel": numel, "stored": "bfloat16", "rates": found, "share_of_copy": shares,
        "environment": environment(device),
    }  # fmt: skip


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
