"""Off-task backdoors: a trigger of one model that makes the merge answer wrongly on the task of another.

The head of a task reads whatever the merged body makes of an input, so an attacker can aim at a class of a task that is
not its own (BadMerging, Zhang et al., arXiv 2408.07362, "off-task"). In the attacker's model that is seen only through
the other task's head and samples. So each task is also scanned with all other models at once, and without its own:
theta_0 + c sum_{s != t} tau_s. T models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_dam.config import DamConfig
from mergekit_dam.merging.rule import merge
from mergekit_dam.scan.classifiers import scan_classes
from mergekit_dam.scan.findings import Finding, averaged
from mergekit_dam.scan.inversion import success_rates
from mergekit_dam.scan.triggers import RecoveredTriggers
from mergekit_dam.tasks import Target, Task


def weights_of_others(tasks: Sequence[Task], index: int, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """theta_0 + c sum_{s != t} tau_s, by output name, for the tensors of task t.

    c is `others_each`, or less where there are so many models that the sum would be over `others_sum`.

    Args:
        tasks: one per model, at least two.
        index: t.
        base: theta_0 by output name.
    """
    others = [task for other, task in enumerate(tasks) if other != index]
    constants = tasks[index].constants
    coefficients = torch.full((len(others),), min(constants.others_each, constants.others_sum / len(others)))
    found = {}
    for name in tasks[index].targets:
        stored = base[name]
        models = [task.own_tensor(name) for task in others]
        found[name] = merge(stored, models, coefficients, None) if stored.is_floating_point() else stored
    return found


@torch.no_grad()
def untouched(task: Task, weights: Mapping[str, Tensor], targets: Sequence[Target]) -> list[float]:
    """Share of calibration samples (`measured_samples` at most) answered with a target as they are, per target.

    Models of other tasks may have lost this one: what they answer anyhow is no trigger's doing.
    """
    rows = torch.arange(min(task.constants.measured_samples, task.num_samples))
    answers_B = task.logits(weights, task.inputs(rows)).argmax(-1)
    wanted_R = torch.tensor(targets, device=answers_B.device)
    return [float(share) for share in (answers_B[:, None] == wanted_R).float().mean(0)]


def weights_of_other(task: Task, other: Task, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Another model in place of a task's own, by output name; theta_0's tensors where it lacks the task's.

    Args:
        task: whose head is to be read.
        other: whose model is taken.
        base: theta_0 by output name.
    """
    own = {name: other.own_tensor(name) for name in task.targets}
    return {name: base[name] if tensor is None else tensor for name, tensor in own.items()}


def carriers(
    tasks: Sequence[Task], index: int, base: Mapping[str, Tensor], found: Sequence[tuple[RecoveredTriggers, Target]]
) -> list[tuple[int, float]]:
    """Which of the other models answers task t's samples with a target most often when they carry its trigger.

    Args:
        index: t.
        found: triggers, one row each, and their targets.

    Returns:
        A model's index for each, the first one of several that do so alike, and how often it does, alone.
    """
    task, success = tasks[index], {}
    for other, owner in enumerate(tasks):
        if other != index:
            weights = weights_of_other(task, owner, base)
            success[other] = [success_rates(task, weights, trigger, [target])[0] for trigger, target in found]
    owners = [max(success, key=lambda other: success[other][row]) for row in range(len(found))]
    return [(owner, success[owner][row]) for row, owner in enumerate(owners)]


def scan_others(index: int, tasks: Sequence[Task], base: Mapping[str, Tensor], config: DamConfig) -> list[Finding]:
    """What all other models bring to a task, each finding with the model whose doing it is.

    What is a model's doing works with it alone, so the lower success counts; side effects of a planted trigger, and
    what several clean models bring about together, work less well then.

    What is nearly suspect is searched again with other batches, and the means count: even among clean models some
    class of another's task is easier to reach, and with few samples single searches differ much.
    """
    task, others = tasks[index], weights_of_others(tasks, index, base)
    found = _others_once(index, task, others, base, config, "others")
    owners = carriers(tasks, index, base, [(one.trigger, one.target) for one in found])
    constants = config.constants
    scale = constants.cross_task_scale
    findings = [_laid(one, owner, share, scale) for one, (owner, share) in zip(found, owners, strict=True)]
    limit = constants.repeat_from * config.suspicion
    if all(one.suspicion < limit for one in findings):
        return findings
    searches = [
        {one.target: one for one in _others_once(index, task, others, base, config, f"others {n}")}
        for n in range(constants.repeats)
    ]

    def again(one: Finding) -> list[Finding | None]:
        assert one.carrier is not None, "just laid to it"
        weights = weights_of_other(task, tasks[one.carrier], base)
        theirs = [search.get(one.target) for search in searches]
        return [
            None
            if more is None
            else _laid(more, one.carrier, success_rates(task, weights, more.trigger, [more.target])[0], scale)
            for more in theirs
        ]

    return [averaged(one, again(one)) if one.suspicion >= limit else one for one in findings]


def _laid(found: Finding, carrier: int, share: float, scale: float) -> Finding:
    """A finding laid to a model, with which alone the trigger has this success."""
    return replace(found, carrier=carrier, success=min(found.success, share), scale=scale)


def _others_once(
    index: int, task: Task, others: Mapping[str, Tensor], base: Mapping[str, Tensor], config: DamConfig, seed: str
) -> list[Finding]:
    """One search, which knows no carrier yet; the control is at least what is answered without a trigger."""
    findings = scan_classes(index, task, others, base, config, seed)
    plain = untouched(task, others, [found.target for found in findings])
    return [replace(found, control=max(found.control, share)) for found, share in zip(findings, plain, strict=True)]
