"""Which process works on which task, and on which part of its batch. T tasks, W processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mergekit_dam.engine.shards import Shards


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
