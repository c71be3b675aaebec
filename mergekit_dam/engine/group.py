"""Join the group of processes that a launcher described in the environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed.device_mesh import init_device_mesh

from mergekit_dam.engine.shards import ALONE, Shards


def is_first() -> bool:
    """Whether this process has rank 0: it alone writes files and prints."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def process_group(*, device: str, timeout: float) -> Iterator[tuple[Shards, torch.device | None]]:
    """Join the process group, and leave it at the end unless an error occurred.

    Args:
        device: the setting `device`; with `cpu` no accelerator is used.
        timeout: seconds that a process may wait for another process.

    Yields:
        The shards of the group and this process's device. Without a group: `ALONE`, and None for any device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, None
        return
    if os.environ["WORLD_SIZE"] == os.environ.get("LOCAL_WORLD_SIZE"):
        # one machine: its name need not resolve to an address in every container
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    accelerator = Accelerator(
        cpu=device == "cpu" or not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
    )
    # the mesh that accelerate makes refuses the CPU
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,), mesh_dim_names=("rows",))
    yield Shards(mesh), accelerator.device
    accelerator.end_training()
