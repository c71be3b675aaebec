"""Compare a classifier over the threshold with its clean twin: theta_0, taught the model's answers.

Some classes of some tasks are easy to reach by a trigger in any model that has learned the task, and theta_0, which has
not, does not show it. The twin has learned the task, and next to nothing of a trigger that it never sees
(distillation: Hinton et al., arXiv 1503.02531). So what a search finds in the twin, it would find in a clean model.

The farther a model is from theta_0, the easier its classes are to reach, so the twin stops where it is as far as the
model. A backdoored model answers its target too often also without the trigger; the twin is not taught that.

An audit names an input model only for what it has beyond its twin. Learning does without twins, because to excuse a
backdoor costs the merge.
Legend: N samples, B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.merging.checks import require_finite
from mergekit_dam.scan.classifiers import search_classes
from mergekit_dam.scan.debiased import debiased
from mergekit_dam.scan.findings import Finding
from mergekit_dam.tasks import Task

_AT_ONCE = 64  # samples that the model answers at a time


def compared_with_twins(
    findings: Sequence[Finding],
    tasks: Sequence[Task],
    base: Mapping[str, Tensor],
    config: DamConfig,
    threshold: float,
) -> list[Finding]:
    """Lower the suspicion of findings by what is found in the clean twins of their models, beyond `twin_allowance`.

    Only classifiers over the threshold by a finding about their own task are compared, and of these no text encoders,
    where the scan names nothing anyway. Findings that are attributed to another model stay as they are.

    Args:
        findings: of a scan.
        tasks: of the models that were scanned.
        base: theta_0 by output name.
        config: the settings of that scan.
        threshold: suspicion from which a model is over; below all scores, each is compared.
    """
    compared = list(findings)
    for index, task in enumerate(tasks):
        about = [f for f in findings if f.task == index and f.source_model is None]
        top = max(about, key=lambda finding: finding.suspicion, default=None)
        if top is None or not task.defended or not isinstance(top.target, int) or top.suspicion < threshold:
            continue
        twin = clean_twin(task, task.own_weights(), base, top.target, config)
        usual = max(finding.suspicion for finding in search_classes(index, task, twin, base, config))
        shared = max(0.0, usual - config.constants.twin_allowance)
        compared = [replace(f, shared=shared) if f in about else f for f in compared]
    return compared


def clean_twin(
    task: Task, own: Mapping[str, Tensor], base: Mapping[str, Tensor], target: int, config: DamConfig
) -> dict[str, Tensor]:
    """Train the twin of a model: its body, below the model's head.

    Args:
        task: its forward pass and calibration samples.
        own: weights of the model, by output name.
        base: theta_0 by output name.
        target: the class that is suspect; the twin learns it no more often than the most frequent other one.
        config: `seed`, and the constants `twin_steps`, `twin_batch_size` and `twin_learning_rate`.

    Returns:
        Weights by output name.

    Raises:
        DamError: weights that diverged.
    """
    constants, names = config.constants, sorted(task.body)
    answers_N = _answers(task, own, target)
    trained = [base[name].detach().float().clone().requires_grad_(True) for name in names]
    weights: dict[str, Tensor] = {**base, **dict(zip(names, trained, strict=True))}
    start = [base[name].detach().float() for name in names]
    far = _distance([own[name].float() for name in names], start)
    optimiser = torch.optim.AdamW(trained, lr=constants.twin_learning_rate, weight_decay=0.0)
    generator = seeds.generator(config.seed, "twin", task.index)
    queue = torch.empty(0, dtype=torch.long)
    size = min(constants.twin_batch_size, task.num_samples)
    for _ in range(constants.twin_steps):
        if len(queue) < size:
            queue = torch.cat([queue, torch.randperm(task.num_samples, generator=generator)])
        rows_B, queue = queue[:size], queue[size:]
        loss = F.cross_entropy(task.logits(weights, task.inputs(rows_B)), answers_N[rows_B.to(task.device)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if _distance(trained, start) >= far:
            break
    for name, tensor in zip(names, trained, strict=True):
        require_finite(tensor.detach(), f"tensor {name}", f"the twin of {task.name}", "Lower twin_learning_rate.")
    return {name: tensor.detach() for name, tensor in weights.items()}


@torch.no_grad()
def _distance(weights: list[Tensor], start: list[Tensor]) -> float:
    """L2 norm of weights - theta_0."""
    return float(torch.stack(torch._foreach_norm(torch._foreach_sub(weights, start))).norm())


@torch.no_grad()
def _answers(task: Task, weights: Mapping[str, Tensor], target: int) -> Tensor:
    """The classes that a model gives to its calibration samples, (N,), without its leaning to the target."""
    parts = torch.arange(task.num_samples).split(_AT_ONCE)
    logits_NK = torch.cat([task.logits(weights, task.inputs(rows_B)) for rows_B in parts])
    return debiased(logits_NK, target).argmax(-1)
