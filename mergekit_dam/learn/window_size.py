"""`window: auto`: how much of the model is learned at a time, so that it fits the device."""

from __future__ import annotations

import dataclasses
from typing import Literal

import psutil
import torch

from mergekit_dam.learn.estimate import MAPPED, estimate
from mergekit_dam.models.compatible import against_windows
from mergekit_dam.models.plan import Plan

_SIZES: tuple[Literal["all"] | int, ...] = ("all", 4, 2, 1)  # the larger the better (benchmarks/STUDY.md)
_USABLE = 0.8  # of the memory that is free


def with_window(plan: Plan, device: torch.device | None) -> Plan:
    """The plan with a window that was chosen, if the setting is `auto`: the largest of all, 4, 2, 1 that fits.

    What needs the whole model gets `all`.

    Args:
        device: that learns; None for several, which share the whole model out.
    """
    if plan.config.window != "auto":
        return plan
    configs = [model.config for model in (plan.base, *plan.models)]
    if device is None or against_windows(plan.config, configs) is not None:
        return _set(plan, "all")
    sizes, free = _SIZES, free_bytes(device)
    chosen = next((size for size in sizes if needed_bytes(_set(plan, size), device) <= _USABLE * free), sizes[-1])
    return _set(plan, chosen)


def needed_bytes(plan: Plan, device: torch.device) -> int:
    """Memory that learning takes there; on the CPU files are mapped and need none."""
    memory = estimate(plan).memory_bytes
    return sum(size for part, size in memory.items() if device.type != "cpu" or part not in MAPPED)


def free_bytes(device: torch.device) -> int:
    """Memory that is free there."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _set(plan: Plan, size: Literal["all"] | int) -> Plan:
    return dataclasses.replace(plan, config=plan.config.model_copy(update={"window": size}))
