"""Compute losses of unlabelled outputs, means over the batch in nats; most are pure functions of logits_BK."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.engine.module_weights import Weights
from mergekit_dam.engine.shards import WorkItem
from mergekit_dam.learn.teacher import TeacherLogits
from mergekit_dam.learn.trigger_pool import TriggerPool
from mergekit_dam.scan.triggers import TriggerBatch
from mergekit_dam.tasks import Task
from mergekit_dam.tasks.bounds import Perturb

_COMPARED, _COMPARED_AT_ONCE = 64, 8  # samples of `first_logits`; of a batch


def entropy(logits_BK: Tensor) -> Tensor:
    """Return H(softmax(f(x))), the unlabelled task loss of AdaMerging (arXiv 2310.02575)."""
    log_p = F.log_softmax(logits_BK, dim=-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def consistency(perturbed_BK: Tensor, clean_BK: Tensor) -> Tensor:
    """Return KL(f(x) || f(x + delta)), which is zero only if the perturbation changes nothing.

    The clean output is the fixed reference. The public DAM code minimises the entropy of f(x + delta), which is also
    low for a confident answer with the attacker's target.
    """
    reference = F.log_softmax(clean_BK.detach(), dim=-1)
    return F.kl_div(F.log_softmax(perturbed_BK, dim=-1), reference, reduction="batchmean", log_target=True)


def distillation(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """Return KL(f_t(x) || f(x)), which is zero if the merge answers as the fine-tuned model does."""
    return consistency(student_BK, teacher_BK)


@torch.no_grad()
def first_logits(task: Task, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the logits of a task's first calibration samples, batch by batch, in host memory."""
    return [task.logits(weights, task.inputs(rows_B)).cpu() for rows_B in _first_batches(task)]


@torch.no_grad()
def divergence(
    task: Task,
    weights: Mapping[str, Tensor],
    teacher: Sequence[Tensor],
    perturbing: Callable[[Tensor], Perturb | None] = lambda _: None,
) -> float:
    """Return the mean of KL(f_t(x) || f(x)) over a task's first calibration samples, in nats.

    Args:
        weights: weights of f, by output name.
        teacher: `first_logits` of model t.
        perturbing: maps indices of samples to the trigger that f sees in them.
    """
    total = 0.0
    for rows_B, given in zip(_first_batches(task), teacher, strict=True):
        logits = task.logits(weights, task.inputs(rows_B), perturbing(rows_B))
        total += float(distillation(logits.float(), given.to(task.device).float())) * len(rows_B)
    return total / min(_COMPARED, task.num_samples)


def _first_batches(task: Task) -> tuple[Tensor, ...]:
    """Return the indices of the samples that `first_logits` is of."""
    return tuple(torch.split(torch.arange(min(_COMPARED, task.num_samples)), _COMPARED_AT_ONCE))


def disagreement(perturbed_BK: Tensor, clean_BK: Tensor) -> Tensor:
    """Return the cross-entropy of f(x + delta) against argmax f(x), which the universal perturbation maximises.

    Source: untargeted universal perturbation (arXiv 1610.08401), step 3 of the published DAM loop.
    """
    return F.cross_entropy(perturbed_BK, clean_BK.detach().argmax(-1))


def fit_loss(
    task: Task,
    item: WorkItem,
    answers: TeacherLogits,
    weights: Weights,
    rows_B: Tensor,
    trigger_pool: TriggerPool,
    config: DamConfig,
    step: int,
    parts: dict[str, Tensor],
) -> Tensor:
    """Return L = KL(f_t(x) || f(x)) + alpha sum_suspects w KL(f_t(x) || f(x + trigger)) of one task.

    Each sample gets one trigger of a suspect's pool; w is the mean weight of these triggers.

    Args:
        item: the task, and the samples of this process; L is then their part of the mean over the whole batch.
        answers: f_t(x).
        weights: weights of the merge.
        rows_B: indices of calibration samples.
        step: seeds the choice of a trigger per sample, together with the setting `seed`.
        parts: the terms of L are added to its entries, by name.
    """
    whole = task.inputs(rows_B)
    inputs = item.of_inputs(whole)
    weight = task.num_answers(inputs) / task.num_answers(whole) if item.parts > 1 else 1.0
    answer = answers(item.of(rows_B), inputs)
    loss = weight * distillation(task.logits(weights, inputs), answer)
    _add(parts, f"loss/perf/{task.name}", loss)
    for suspect, pool in trigger_pool.items():
        if suspect.task != item.task:
            continue
        weights_R = torch.tensor([one.weight for one in pool])
        generator = seeds.generator(config.seed, "pool", task.index, suspect.target, step)
        which_B = torch.randint(len(pool), (len(rows_B),), generator=generator)
        triggers = TriggerBatch.stack([one.trigger for one in pool])
        perturb = triggers.perturb(item.of(which_B).to(task.device))
        alpha = config.alpha * float(weights_R[which_B].mean())
        safety = weight * alpha * distillation(task.logits(weights, inputs, perturb), answer)
        _add(parts, f"loss/safe/{task.name}", safety)
        loss = loss + safety
    return loss


def _add(parts: dict[str, Tensor], name: str, loss: Tensor) -> None:
    """Add a loss to `parts` as a tensor: reading its value would wait for the accelerator."""
    parts[name] = parts[name] + loss.detach() if name in parts else loss.detach()


def sum_terms(by_process: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sum loss terms over processes, by name."""
    total: dict[str, float] = {}
    for parts in by_process:
        for name, value in parts.items():
            total[name] = total.get(name, 0.0) + value
    return total


def calibration_batch(task: Task, config: DamConfig, step: int) -> Tensor:
    """Draw the indices (B,) of a step's calibration samples; they depend on seed and step only."""
    generator = seeds.generator(config.seed, "batch", task.index, step)
    return torch.randperm(task.num_samples, generator=generator)[: config.batch_size]
