"""`window: auto`: choose the number of blocks learned at a time, so that learning fits the memory of each process."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Literal

import psutil
import torch

from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.errors import DamError
from mergekit_dam.learn.estimate import MAPPED, estimate
from mergekit_dam.models.compatible import against_windows
from mergekit_dam.models.plan import Plan

_SIZES: tuple[Literal["all"] | int, ...] = ("all", 4, 2, 1)  # larger windows are better (benchmarks/STUDY.md)
_USABLE = 0.8  # share of the free memory that is used
_ASK_ALL = "import torch; print(min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())))"


def with_window(plan: Plan, device: torch.device, *, workers: int = 1, shards: Shards = ALONE) -> Plan:
    """Choose the window of a plan whose setting is `auto`: the largest of all, 4, 2, 1 that fits each process.

    Objectives and models that cannot be learned in windows get `all`.

    Args:
        device: the kind of device that learns.
        workers: number of worker processes that this process will start.
        shards: processes that call this together; all choose the same window.
    """
    if plan.config.window != "auto":
        return plan
    configs = [model.config for model in (plan.base, *plan.models)]
    if against_windows(plan.config, configs) is not None:
        return _set(plan, "all")
    processes = max(workers, shards.size)
    free = min(shards.all_gather_dict({shards.rank: free_bytes(device, workers, shards.size)}).values())
    fits = (size for size in _SIZES if needed_bytes(_set(plan, size), device, processes) <= _USABLE * free)
    return _set(plan, next(fits, _SIZES[-1]))


def window_warning(plan: Plan) -> str:
    """Return a warning of the costs of learning in windows."""
    return (
        "the masks of the whole model do not fit the free memory: they are learned "
        f"{plan.config.window} of its blocks at a time, which costs accuracy, and with one block at a time some of the "
        "defence (docs/scaling.md)"
    )


def needed_bytes(plan: Plan, device: torch.device, processes: int = 1) -> int:
    """Estimate the memory that each process needs to learn; on the CPU files are mapped and need none."""
    memory = estimate(plan, processes=processes).memory_bytes
    return sum(size for part, size in memory.items() if device.type != "cpu" or part not in MAPPED)


def free_bytes(device: torch.device, workers: int = 1, launched: int = 1) -> int:
    """Measure the free memory of one process, in bytes.

    Args:
        device: the kind of device that learns.
        workers: number of worker processes to start, each on its own accelerator or all on this CPU.
        launched: number of processes that `accelerate launch` started.

    Raises:
        DamError: the accelerators did not report their memory.
    """
    if device.type != "cuda":
        return int(psutil.virtual_memory().available) // max(workers, launched)
    if workers == 1:
        return int(torch.cuda.mem_get_info(device)[0])
    # in another process: a device that this process opens would keep memory while the workers learn
    query = subprocess.run([sys.executable, "-c", _ASK_ALL], capture_output=True, text=True, check=False)
    if query.returncode:
        raise DamError(
            "window: auto",
            expected="accelerators that report their free memory",
            got=query.stderr.strip().splitlines()[-1] if query.stderr.strip() else f"exit status {query.returncode}",
            cure="Set window: all, or a number.",
        )
    return int(query.stdout)


def _set(plan: Plan, size: Literal["all"] | int) -> Plan:
    """Return the plan with another window."""
    return dataclasses.replace(plan, config=plan.config.model_copy(update={"window": size}))
