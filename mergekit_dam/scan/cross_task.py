"""Scan for off-task backdoors: triggers of one model that make the merge answer wrongly on the task of another.

The head of a task reads whatever the merged body makes of an input, so an attacker can aim at a class of a task that is
not its own (BadMerging, Zhang et al., arXiv 2408.07362, "off-task"). In the attacker's model that is seen only through
the other task's head and samples. So each task is also scanned in a merge of all models but its own:
theta_0 + c sum_{s != t} tau_s. Each finding is then attributed to the model in which its trigger works best alone.
Legend: T models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_dam.config import DamConfig
from mergekit_dam.merging.rule import merge
from mergekit_dam.scan.classifiers import scan_classes
from mergekit_dam.scan.findings import Finding, mean_of_searches
from mergekit_dam.scan.inversion import success_rates
from mergekit_dam.scan.triggers import TriggerBatch
from mergekit_dam.tasks import Target, Task


def merge_without(tasks: Sequence[Task], index: int, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge all models but task t's own: theta_0 + c sum_{s != t} tau_s.

    c is `others_each`, or less where there are so many models that the sum would be over `others_sum`.

    Args:
        tasks: one per model, at least two.
        index: t.
        base: theta_0 by output name.

    Returns:
        Weights by output name, for the tensors of task t.
    """
    others = [task for other, task in enumerate(tasks) if other != index]
    constants = tasks[index].constants
    coefficients = torch.full((len(others),), min(constants.others_each, constants.others_sum / len(others)))
    merged = {}
    for name in tasks[index].targets:
        stored = base[name]
        models = [task.own_tensor(name) for task in others]
        merged[name] = merge(stored, models, coefficients, None) if stored.is_floating_point() else stored
    return merged


@torch.no_grad()
def success_without_trigger(task: Task, weights: Mapping[str, Tensor], targets: Sequence[Target]) -> list[float]:
    """Measure on which share of calibration samples a model answers each target without any trigger.

    A model of another task may have lost this one: no trigger is the cause of what it answers anyhow.

    Args:
        task: whose head and samples are used.
        weights: by output name.
        targets: classes.
    """
    rows = torch.arange(min(task.constants.measured_samples, task.num_samples))
    answers_B = task.logits(weights, task.inputs(rows)).argmax(-1)
    wanted_R = torch.tensor(targets, device=answers_B.device)
    return [float(share) for share in (answers_B[:, None] == wanted_R).float().mean(0)]


def weights_from(task: Task, source: Task, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of another model for a task's forward pass, by output name.

    Args:
        task: whose head reads them.
        source: whose model's weights are taken.
        base: theta_0 by output name, for tensors that the other model lacks.
    """
    own = {name: source.own_tensor(name) for name in task.targets}
    return {name: base[name] if tensor is None else tensor for name, tensor in own.items()}


def source_models(
    tasks: Sequence[Task], index: int, base: Mapping[str, Tensor], triggers: Sequence[tuple[TriggerBatch, Target]]
) -> list[tuple[int, float]]:
    """Find, per trigger, the other model that it makes answer its target most often on task t's samples.

    Args:
        tasks: one per model.
        index: t.
        base: theta_0 by output name.
        triggers: one row each, with their targets.

    Returns:
        Per trigger the index of that model, the first of several with equal success, and its success alone.
    """
    task, success = tasks[index], {}
    for model, source in enumerate(tasks):
        if model != index:
            weights = weights_from(task, source, base)
            success[model] = [success_rates(task, weights, trigger, [target])[0] for trigger, target in triggers]
    best = [max(success, key=lambda model: success[model][row]) for row in range(len(triggers))]
    return [(model, success[model][row]) for row, model in enumerate(best)]


def scan_cross_task(index: int, tasks: Sequence[Task], base: Mapping[str, Tensor], config: DamConfig) -> list[Finding]:
    """Search task t for triggers that other models planted, and attribute each finding to one model.

    A backdoor of one model works with that model alone, so the lower success counts. Side effects of a planted trigger,
    and what several clean models bring about together, work less well alone.

    A finding that is nearly suspect is searched for again with other batches, and the means count: even among clean
    models some class of another's task is easier to reach, and with few samples single searches differ much.

    Args:
        index: t.
        tasks: one per model, at least two.
        base: theta_0 by output name.
        config: `suspicion`, and what `scan_classes` takes.
    """
    task, merged = tasks[index], merge_without(tasks, index, base)
    first = search_once(index, task, merged, base, config, "others")
    sources = source_models(tasks, index, base, [(finding.trigger, finding.target) for finding in first])
    constants = config.constants
    scale = constants.cross_task_scale
    findings = [attributed(finding, *source, scale) for finding, source in zip(first, sources, strict=True)]
    limit = constants.repeat_from * config.suspicion
    if all(finding.suspicion < limit for finding in findings):
        return findings
    searches = [
        {finding.target: finding for finding in search_once(index, task, merged, base, config, f"others {n}")}
        for n in range(constants.repeats)
    ]

    def repeated(finding: Finding) -> list[Finding | None]:
        assert finding.source_model is not None, "attributed above"
        weights = weights_from(task, tasks[finding.source_model], base)
        repeats = []
        for search in searches:
            again = search.get(finding.target)
            if again is not None:
                (share,) = success_rates(task, weights, again.trigger, [again.target])
                again = attributed(again, finding.source_model, share, scale)
            repeats.append(again)
        return repeats

    return [mean_of_searches(f, repeated(f)) if f.suspicion >= limit else f for f in findings]


def attributed(finding: Finding, source_model: int, share: float, scale: float) -> Finding:
    """Attribute a finding to a model, with which alone its trigger has the success `share`."""
    return replace(finding, source_model=source_model, success=min(finding.success, share), scale=scale)


def search_once(
    index: int, task: Task, merged: Mapping[str, Tensor], base: Mapping[str, Tensor], config: DamConfig, seed: str
) -> list[Finding]:
    """Search a task once in the merge without its own model; no finding is attributed yet.

    `base_success` is at least the share of samples that the merge answers so without a trigger.
    """
    findings = scan_classes(index, task, merged, base, config, seed)
    plain = success_without_trigger(task, merged, [finding.target for finding in findings])
    return [
        replace(finding, base_success=max(finding.base_success, share))
        for finding, share in zip(findings, plain, strict=True)
    ]
