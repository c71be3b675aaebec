"""Distribute tensors and tasks over processes; with one process every operation here is the identity.

A tensor is split along dim 0 as DTensor's `Shard(0)` splits it: rows in order, ceil(rows / processes) each, so that the
last processes may hold fewer rows or none. Merging is elementwise and runs on rows; only the merged tensor is gathered
and only its gradient is summed. `all_gather`, `reduce_scatter`, `all_reduce`, `broadcast`, `all_gather_dict` and
`barrier` are collective: every process must call them in the same order. Legend: W processes.
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
        mesh: mesh of all processes of the run; None for one process.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.mesh = mesh
        self.size = 1 if mesh is None else mesh.size()
        self.rank = 0 if mesh is None else mesh.get_local_rank()

    def owner(self, index: int) -> int:
        """Return the rank that computes item `index`: items are assigned round robin."""
        return index % self.size

    def owns(self, index: int) -> bool:
        """Whether this process computes item `index`."""
        return self.owner(index) == self.rank

    def rows(self, count: int) -> slice:
        """Return this process's rows out of `count`."""
        chunk = math.ceil(count / self.size)
        return slice(min(count, self.rank * chunk), min(count, (self.rank + 1) * chunk))

    def local(self, tensor: Tensor) -> Tensor:
        """Return this process's rows of a whole tensor, as a view; a scalar is the only row of the first process."""
        if self.size == 1:
            return tensor
        tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
        return tensor[self.rows(len(tensor))]

    def local_shape(self, shape: Shape) -> tuple[int, ...]:
        """Return the shape of this process's rows of a tensor of `shape`."""
        if self.size == 1:
            return tuple(shape)
        cut = self.rows(shape[0] if shape else 1)
        return (cut.stop - cut.start, *shape[1:])

    def distributed(self, local: Tensor, shape: Shape) -> Tensor:
        """Wrap this process's rows as a DTensor of the whole, which shares memory with `local`."""
        if self.mesh is None:
            return local
        whole = torch.empty(tuple(shape) or (1,), device="meta")
        return DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def all_gather(self, local: Tensor, shape: Shape) -> Tensor:
        """Return the whole tensor of `shape` from the rows of all processes."""
        if self.mesh is None:
            return local
        count, *row_shape = tuple(shape) or (1,)
        most = math.ceil(count / self.size)
        rows = local.detach().contiguous()
        if len(rows) < most:  # the collective needs equally many rows from each process
            rows = torch.cat([rows, rows.new_zeros(most - len(rows), *row_shape)])
        whole = rows.new_empty(most * self.size, *row_shape)
        # not through DTensor: with its redistribution over gloo the heap was damaged in one of 60 runs
        dist.all_gather_into_tensor(whole, rows, group=self.mesh.get_group())
        return whole[:count].reshape(tuple(shape))

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """Return this process's rows of the sum of `whole` over all processes."""
        if self.mesh is None:
            return whole
        whole = whole.reshape(1) if whole.ndim == 0 else whole
        # to_local alone would return this process's own term: the redistribution sums
        partial = DTensor.from_local(whole, self.mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=[Shard(0)]).to_local()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all processes."""
        if self.mesh is None:
            return tensor
        partial = DTensor.from_local(tensor, self.mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=[Replicate()]).to_local()

    def broadcast(self, tensors: Iterable[Tensor], owner: int) -> None:
        """Fill `tensors` of all processes with the values of process `owner`."""
        if self.mesh is not None:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), group_src=owner, group=self.mesh.get_group())

    def all_gather_dict(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """Merge mappings of small values (numbers and texts, no tensors) of all processes; keys are distinct."""
        if self.mesh is None:
            return dict(values)
        gathered: list[Mapping[Any, Any]] = [{} for _ in range(self.size)]
        dist.all_gather_object(gathered, dict(values), group=self.mesh.get_group())
        return {key: value for part in gathered for key, value in part.items()}

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        self.all_gather_dict({})


ALONE = Shards()


@dataclass(frozen=True)
class WorkItem:
    """One process's work on one task in a step: its whole batch, or every `parts`-th sample from `part` on."""

    task: int
    part: int = 0
    parts: int = 1

    def of(self, batch_B: Tensor) -> Tensor:
        """Return this item's samples of a batch (B, ...)."""
        return batch_B if self.parts == 1 else batch_B[self.part :: self.parts]

    def of_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this item's samples of all inputs of a task, by input name."""
        return {name: self.of(tensor) for name, tensor in inputs.items()}


def schedule(batch_sizes: Sequence[int], shards: Shards) -> list[WorkItem | None]:
    """List the work of this process in a step, in order; None is a round without work.

    With W <= T each process gets whole tasks. With W > T several processes share the batch of a task. All processes get
    lists of the same length, so that collective calls match.

    Args:
        batch_sizes: B of each of the T tasks; of the processes of a task, only the first B get a sample.
    """
    tasks, rank, size = len(batch_sizes), shards.rank, shards.size
    if size <= tasks:
        return [WorkItem(first + rank) if first + rank < tasks else None for first in range(0, tasks, size)]
    task, part = rank % tasks, rank // tasks
    parts = min(len(range(task, size, tasks)), batch_sizes[task])
    return [WorkItem(task, part, parts) if part < parts else None]
