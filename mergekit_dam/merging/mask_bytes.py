"""Probabilities of masks as they are kept: one byte each, in steps of 1/254, so that 0, 1/2 and 1 are exact.

Rounding moves a probability by 0.002 at most. A file is half as large as with float16, and applying masks is bound by
reading them (benchmarks/dam_bench/performance/run_steps.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 254


def to_bytes(probabilities: Tensor) -> Tensor:
    """uint8, the same shape; what is bytes already stays as it is.

    Args:
        probabilities: in [0, 1], any floating type.
    """
    if probabilities.dtype == torch.uint8:
        return probabilities
    return probabilities.to(torch.float32).mul(STEPS).round_().to(torch.uint8)


def to_probabilities(values: Tensor, out: Tensor | None = None) -> Tensor:
    """float32, the same shape.

    Args:
        values: bytes, or probabilities in any floating type (files of schema 1 have float16).
        out: float32, where they go; a new tensor if not given.
    """
    out = torch.empty(values.shape, dtype=torch.float32, device=values.device) if out is None else out
    out.copy_(values)
    return out.div_(STEPS) if values.dtype == torch.uint8 else out
