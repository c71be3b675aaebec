"""How tensors and tasks are spread over processes; with one process everything here is the identity.

A tensor is cut along dim 0 as DTensor's `Shard(0)` cuts it: rows in order, ceil(rows / processes) each, so that the
last processes may hold fewer or none. Merging is elementwise and hence done on rows; only the merged tensor is
gathered and only its gradient is summed. All methods but `rows`, `local` and `owns` are collective: every process
must call them in the same order. Legend: W processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

Shape = Sequence[int]


class Shards:
    """A one-dimensional mesh of processes.

    Args:
        mesh: of all processes of the run; None for one process.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.mesh = mesh
        self.size = 1 if mesh is None else mesh.size()
        self.rank = 0 if mesh is None else mesh.get_local_rank()

    def owner(self, index: int) -> int:
        """The process that does piece `index` of some work: pieces are dealt out in turn."""
        return index % self.size

    def owns(self, index: int) -> bool:
        """Whether piece `index` is ours."""
        return self.owner(index) == self.rank

    def rows(self, count: int) -> slice:
        """Our rows out of `count`."""
        chunk = math.ceil(count / self.size)
        return slice(min(count, self.rank * chunk), min(count, (self.rank + 1) * chunk))

    def local(self, tensor: Tensor) -> Tensor:
        """Our rows of a whole tensor, as a view; a scalar is the first process's only row."""
        if self.size == 1:
            return tensor
        tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
        return tensor[self.rows(len(tensor))]

    def local_shape(self, shape: Shape) -> tuple[int, ...]:
        """Shape of our rows of a tensor of `shape`."""
        if self.size == 1:
            return tuple(shape)
        cut = self.rows(shape[0] if shape else 1)
        return (cut.stop - cut.start, *shape[1:])

    def distributed(self, local: Tensor, shape: Shape) -> Tensor:
        """Our rows as part of the whole: a DTensor that shares memory with `local`."""
        if self.mesh is None:
            return local
        whole = torch.empty(tuple(shape) or (1,), device="meta")
        return DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def gather(self, local: Tensor, shape: Shape) -> Tensor:
        """The whole tensor of `shape` from everyone's rows."""
        if self.mesh is None:
            return local
        count, *rest = tuple(shape) or (1,)
        most = math.ceil(count / self.size)
        rows = local.detach().contiguous()
        if len(rows) < most:  # equally many from everyone, as the collective wants it
            rows = torch.cat([rows, rows.new_zeros(most - len(rows), *rest)])
        whole = rows.new_empty(most * self.size, *rest)
        # not through DTensor: with its redistribution over gloo the heap was damaged in one of 60 runs
        dist.all_gather_into_tensor(whole, rows, group=self.mesh.get_group())
        return whole[:count].reshape(tuple(shape))

    def scatter(self, whole: Tensor) -> Tensor:
        """Our rows of the sum of everyone's `whole`."""
        if self.mesh is None:
            return whole
        whole = whole.reshape(1) if whole.ndim == 0 else whole
        # to_local alone would hand out this process's own term: the redistribution is what sums
        partial = DTensor.from_local(whole, self.mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=[Shard(0)]).to_local()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of everyone's `tensor`."""
        if self.mesh is None:
            return tensor
        partial = DTensor.from_local(tensor, self.mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=[Replicate()]).to_local()

    def broadcast(self, tensors: Iterable[Tensor], owner: int) -> None:
        """Fill `tensors` with process `owner`'s."""
        if self.mesh is not None:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), group_src=owner, group=self.mesh.get_group())

    def union(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """Everyone's small entries (numbers and texts, no tensors) in one mapping; keys are distinct."""
        if self.mesh is None:
            return dict(values)
        gathered: list[Mapping[Any, Any]] = [{} for _ in range(self.size)]
        dist.all_gather_object(gathered, dict(values), group=self.mesh.get_group())
        return {key: value for part in gathered for key, value in part.items()}

    def barrier(self) -> None:
        """Wait for all."""
        self.union({})


ALONE = Shards()


@dataclass(frozen=True)
class Share:
    """A task, or every `parts`-th sample of its batch from number `part` on."""

    task: int
    part: int = 0
    parts: int = 1

    def of(self, batch_B: Tensor) -> Tensor:
        """Our samples of a batch (B, ...)."""
        return batch_B if self.parts == 1 else batch_B[self.part :: self.parts]

    def of_all(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our samples of all inputs of a task."""
        return {name: self.of(tensor) for name, tensor in inputs.items()}


def turns(batch_sizes: Sequence[int], shards: Shards) -> list[Share | None]:
    """What this process does in a step, one after another; every process has equally many turns.

    With W <= T tasks are dealt out. With more processes than tasks, those of one task share its batch.

    Args:
        batch_sizes: B of each of the T tasks; a process beyond that number of samples has nothing to do.
    """
    tasks, rank, size = len(batch_sizes), shards.rank, shards.size
    if size <= tasks:
        return [Share(first + rank) if first + rank < tasks else None for first in range(0, tasks, size)]
    task, part = rank % tasks, rank // tasks
    parts = min(len(range(task, size, tasks)), batch_sizes[task])
    return [Share(task, part, parts) if part < parts else None]
