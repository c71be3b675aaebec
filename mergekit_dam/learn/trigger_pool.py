"""Keep a pool of triggers of the suspects, and add triggers recovered from the current weights. T tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

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
    known: Mapping[Suspect, TriggerBatch] = MappingProxyType({}),
) -> None:
    """Recover a wide trigger of each suspect target and add it to the pool; processes share the suspects.

    Args:
        tasks: T tasks.
        trigger_pool: triggers by suspect; each suspect gets one more, and at most the first and the latest are kept.
        base: theta_0 by output name.
        weights_of: returns the weights to recover a suspect's trigger from.
        steps: steps of each inversion.
        seed: parts of the seed, in addition to the setting `seed`, task and class.
        known: triggers to add as they are, without a search.
    """
    constants = config.constants
    triggers = [blank(tasks[suspect.task], suspect.kind) for suspect in trigger_pool]
    weights: dict[int, float] = {}
    for index, suspect in enumerate(trigger_pool):
        if shards.owns(index):
            task, others = tasks[suspect.task], () if suspect.source_model is None else ("others",)
            if suspect in known:
                triggers[index] = known[suspect].rows([0])  # the finding keeps its own: a snapshot holds both
            else:
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
                # a step with a causal LM is dear, and the trigger is widest when it first works
                triggers[index] = search.run(steps, until_works=not task.classifies).best
            (base_success,) = success_rates(task, base, triggers[index], [suspect.target])
            weights[index] = max(constants.least_trigger_weight, 1.0 - base_success)
    weights = shards.all_gather_dict(weights)
    for index, pool in enumerate(trigger_pool.values()):
        shards.broadcast(triggers[index].parameters, shards.owner(index))
        pool.append(WeightedTrigger(triggers[index], weights[index]))
        del pool[1 : len(pool) - (constants.pool_size - 1)]


@dataclass(frozen=True, eq=False)
class WeightedTrigger:
    """A recovered trigger that masks are fitted against, with its weight in the loss.

    Attributes:
        trigger: a batch of one trigger.
        weight: share of calibration samples on which the trigger fails on theta_0, at least `least_trigger_weight`. A
            wide trigger resembles its class, which theta_0 knows, too, so resisting it costs accuracy on that class.
            The least weight is needed because a trigger that was fitted to theta_0 works on theta_0 as well.
    """

    trigger: TriggerBatch
    weight: float


TriggerPool = dict[Suspect, list[WeightedTrigger]]
