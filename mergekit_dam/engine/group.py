"""The group of processes that this one is in, as its launcher says in the environment."""

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
    """Whether this process is the only one of its group, or the one that writes and speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined(*, device: str, timeout: float) -> Iterator[tuple[Shards, torch.device | None]]:
    """Join the group, and leave it at the end if all went well. A process without one is alone, on any device (None).

    Args:
        device: the setting; `cpu` keeps accelerators out.
        timeout: seconds that one process may wait for another.
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
    # accelerate's own mesh refuses the CPU
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,), mesh_dim_names=("rows",))
    yield Shards(mesh), accelerator.device
    accelerator.end_training()
