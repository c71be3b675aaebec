"""Groups of real processes for tests: gloo, started by fork, so that nothing is imported again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import start_processes

from mergekit_dam.engine.shards import Shards


def group(function: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """What `function(shards, *arguments)` returns in each of `count` processes; their exceptions are raised."""
    with tempfile.TemporaryDirectory() as folder:
        # a process that has used an accelerator cannot be forked
        method = "spawn" if torch.accelerator.is_available() else "fork"
        start_processes(_member, (function, count, folder, arguments), nprocs=count, start_method=method)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _member(rank: int, function: Callable[..., Any], count: int, folder: str, arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    shards = Shards(init_device_mesh("cpu", (count,), mesh_dim_names=("rows",)))
    torch.save(function(shards, *arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
