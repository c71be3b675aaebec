"""Triggers of the suspect classes, recovered from one set of weights after another. T tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.engine.shards import Shards
from mergekit_dam.scan.findings import Suspect, blank, kind_of
from mergekit_dam.scan.inversion import Inversion, Pace, success_rates
from mergekit_dam.scan.triggers import TriggerBatch, started
from mergekit_dam.tasks import Task


def refresh_triggers(
    tasks: Sequence[Task],
    trigger_pool: TriggerPool,
    shards: Shards,
    config: DamConfig,
    base: Mapping[str, Tensor],
    weights_of: Callable[[Suspect], Mapping[str, Tensor]],
    steps: int,
    *seed: object,
) -> None:
    """Recover a wide trigger of each suspect target and add it to the pool; processes share the suspects.

    Args:
        tasks: T of them.
        trigger_pool: triggers by suspect; each suspect gets one more, and at most the first and the latest are kept.
        base: theta_0 by output name.
        weights_of: what to invert for a suspect.
        steps: of each inversion.
        seed: beside the setting's, the task's and the class's.
    """
    constants = config.constants
    found = [blank(tasks[suspect.task], suspect.kind) for suspect in trigger_pool]
    weights: dict[int, float] = {}
    for turn, suspect in enumerate(trigger_pool):
        if shards.owns(turn):
            task, others = tasks[suspect.task], () if suspect.source_model is None else ("others",)
            generator = seeds.generator(config.seed, "wide", task.index, suspect.target, *others, *seed)
            search = Inversion(
                task,
                weights_of(suspect),
                [suspect.target],
                batch_size=constants.wide_batch_size,
                pace=Pace.wide(constants),
                generator=generator,
                start=started(task, kind_of(task, suspect.kind), 1, generator),
            )
            found[turn] = search.run(steps).best
            (base_success,) = success_rates(task, base, found[turn], [suspect.target])
            weights[turn] = max(constants.least_trigger_weight, 1.0 - base_success)
    weights = shards.all_gather_dict(weights)
    for turn, pool in enumerate(trigger_pool.values()):
        shards.broadcast(found[turn].parameters, shards.owner(turn))
        pool.append(WeightedTrigger(found[turn], weights[turn]))
        del pool[1 : len(pool) - (constants.pool_size - 1)]


@dataclass(frozen=True, eq=False)
class WeightedTrigger:
    """A recovered trigger that masks are fitted against, with its weight in the loss.

    Attributes:
        trigger: one row.
        weight: how much it counts: the share of calibration samples on which theta_0 does not fall for it, or
            `least_trigger_weight`. Wide triggers have much of their class's own looks, which theta_0 knows, too; to
            withstand them costs accuracy on that class. A trigger that was fitted to theta_0 works on it as well, so
            all count.
    """

    trigger: TriggerBatch
    weight: float


TriggerPool = dict[Suspect, list[WeightedTrigger]]
