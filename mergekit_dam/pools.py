"""Triggers of the suspect classes, recovered from one set of weights after another. T tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.distributed.shards import Shards
from mergekit_dam.inversion import WIDE, Inversion
from mergekit_dam.tasks import Target, Task
from mergekit_dam.triggers import RecoveredTriggers

_BATCH = 12  # samples per step of the search for a trigger to fit against
_POOL = 8  # triggers kept per suspect: the first one, and the latest


def blank(task: Task, count: int = 1) -> RecoveredTriggers:
    """Triggers for a task, to be filled."""
    return RecoveredTriggers.start(count, task.perturbation_shape, task.bounds, seeds.generator("blank"))


def recover(
    tasks: Sequence[Task], pools: Mapping[tuple[int, Target], list[RecoveredTriggers]], shards: Shards,
    config: DamConfig, weights_of: Callable[[int], Mapping[str, Tensor]], steps: int, *seed: object,
) -> None:  # fmt: skip
    """A wide trigger of each suspect target into its pool; the suspects are shared out over the processes.

    Args:
        tasks: T of them.
        pools: by task and target.
        weights_of: what to invert, by the index of a task.
        steps: of each inversion.
        seed: beside the setting's, the task's and the class's.
    """
    found = [blank(tasks[index]) for index, _ in pools]
    for turn, (index, target) in enumerate(pools):
        if shards.owns(turn):
            task = tasks[index]
            search = Inversion(
                task, weights_of(index), [target], batch_size=_BATCH, pace=WIDE,
                generator=seeds.generator(config.seed, "wide", task.name, target, *seed),
            )  # fmt: skip
            found[turn] = search.run(steps).best
    for turn, pool in enumerate(pools.values()):
        shards.broadcast(found[turn].parameters, shards.owner(turn))
        pool.append(found[turn])
        del pool[1 : len(pool) - (_POOL - 1)]
