"""Store probabilities of masks as one byte each, in steps of 1/254, so that 0, 1/2 and 1 are exact.

Rounding changes a probability by at most 0.002. A file is half as large as with float16, and reading masks takes most
of the time of applying them (benchmarks/dam_bench/performance/run_steps.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 254


def to_bytes(probabilities: Tensor) -> Tensor:
    """Convert probabilities to uint8 of the same shape; bytes are returned unchanged.

    Args:
        probabilities: in [0, 1], any floating type.
    """
    if probabilities.dtype == torch.uint8:
        return probabilities
    return probabilities.to(torch.float32).mul(STEPS).round_().to(torch.uint8)


def to_probabilities(values: Tensor, out: Tensor | None = None) -> Tensor:
    """Convert bytes to float32 probabilities of the same shape.

    Args:
        values: bytes, or probabilities in any floating type (files of schema 1 have float16).
        out: float32 tensor to write to; a new tensor if not given.
    """
    out = torch.empty(values.shape, dtype=torch.float32, device=values.device) if out is None else out
    out.copy_(values)
    return out.div_(STEPS) if values.dtype == torch.uint8 else out
