"""Blind scan for backdoors: targeted inversion of every class of every input model, with theta_0 as the control.

A backdoor is a small universal trigger that makes f_t answer one class (Wang et al., Neural Cleanse, IEEE S&P 2019).
Such triggers also exist in clean models, as universal adversarial patterns; those work on theta_0 too, from which
f_t was fine-tuned, while an implanted trigger is known to f_t alone. The scan sees unlabelled calibration data only.
Legend: T tasks, B batch, R triggers, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.merged_model import fixed
from mergekit_dam.tasks import Task
from mergekit_dam.triggers import RecoveredTriggers

SUCCESS = 0.95  # of the batch; a trigger above it may shrink, one below it may grow
_RELATIVE = 0.75  # a class is suspect only if it comes this near to the most suspect one of its task
_LEARNING_RATE = 0.1
_PENALTY = {"pixels": 1e-3, "tokens": 1e-2}  # start of the price of a unit of size
_CHECKED = 64  # samples that success is measured on


@dataclass(frozen=True, eq=False)
class Finding:
    """What the scan found for one class of one model.

    Attributes:
        task: the model's index.
        target: the class.
        trigger: the recovered trigger, one row.
        size: in pixels, or in units of the embedding range.
        success: share of calibration samples that f_t gives the target with the trigger.
        control: the same share for theta_0 with the head of t.
    """

    task: int
    target: int
    trigger: RecoveredTriggers
    size: float
    success: float
    control: float

    @property
    def suspicion(self) -> float:
        """Success that theta_0 does not share, -1..1."""
        return self.success - self.control

    def to_json(self, name: str) -> dict[str, Any]:
        """Numbers for the artefact and the log."""
        rounded = {k: round(float(getattr(self, k)), 4) for k in ("size", "success", "control", "suspicion")}
        return {"task": name, "target": self.target, **rounded}


def invert(
    task: Task,
    weights: Mapping[str, Tensor],
    targets_R: Tensor,
    *,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    num_classes: int | None = None,
) -> RecoveredTriggers:
    """Smallest universal triggers that make a model answer `targets_R`, found by Adam, all rows at once.

    The price of size rises by 1.12 while a trigger works on 95 % of the last batches and falls by 1.25 otherwise; a
    row's result is its smallest trigger that worked, or the last one. With `num_classes` the start is drawn for all
    classes, so that a search of some of them starts as one of all does.
    """
    start = RecoveredTriggers.start(num_classes or len(targets_R), task.perturbation_shape, task.bounds, generator)
    if num_classes is not None:
        start = start.rows(targets_R.tolist())
    triggers = RecoveredTriggers([p.requires_grad_(True) for p in start.parameters], task.bounds)
    optimiser = torch.optim.Adam(triggers.parameters, lr=_LEARNING_RATE, betas=(0.5, 0.9))
    best = triggers.rows(range(len(targets_R)))
    unit = "tokens" if len(task.perturbation_shape) == 2 else "pixels"
    price_R = torch.full(targets_R.shape, _PENALTY[unit], device=task.device)
    smallest_R = torch.full_like(price_R, torch.inf)
    success_R: Tensor | None = None
    still = fixed(weights)
    for _ in range(steps):
        rows_B = torch.randint(task.num_samples, (min(batch_size, task.num_samples),), generator=generator)
        logits = _triggered(task, still, triggers, rows_B)
        targets = targets_R.to(task.device).repeat_interleave(len(rows_B))
        losses_R = F.cross_entropy(logits, targets, reduction="none").view(len(targets_R), -1).mean(1)
        size_R = triggers.size()
        gradients = torch.autograd.grad((losses_R + price_R * size_R).sum(), triggers.parameters)
        hits_R = (logits.argmax(-1) == targets).float().view(len(targets_R), -1).mean(1)
        success_R = hits_R if success_R is None else 0.7 * success_R + 0.3 * hits_R
        works_R = success_R >= SUCCESS
        with torch.no_grad():
            better_R = works_R & (size_R < smallest_R)
            smallest_R = torch.where(better_R, size_R, smallest_R)
            unfound_R = smallest_R.isinf()
            for kept, now, gradient in zip(best.parameters, triggers.parameters, gradients, strict=True):
                kept[better_R | unfound_R] = now[better_R | unfound_R]
                now.grad = gradient
        price_R = torch.where(works_R, price_R * 1.12, price_R / 1.25).clamp(1e-5, 10.0)
        optimiser.step()
    return best


@torch.no_grad()
def success_rates(
    task: Task, weights: Mapping[str, Tensor], triggers: RecoveredTriggers, targets_R: Tensor
) -> list[float]:
    """Share of (at most 64) calibration samples that a model gives the targets with the triggers, per row."""
    rows_B = torch.arange(min(_CHECKED, task.num_samples))
    rates = []
    for row, target in enumerate(targets_R.tolist()):
        logits = _triggered(task, weights, triggers.rows([row]), rows_B)
        rates.append(float((logits.argmax(-1) == target).float().mean()))
    return rates


def scan(
    tasks: Sequence[Task],
    base: Mapping[str, Tensor],
    config: DamConfig,
    tasks_in_turn: Iterable[int],
    part: tuple[int, int] = (0, 1),
) -> list[Finding]:
    """Every class of every model that classifies.

    Args:
        tasks: one per model.
        base: theta_0 by output name.
        config: `scan_steps`, `scan_batch_size`, `seed`.
        tasks_in_turn: their indices.
        part: (i, n) for the i-th of n shares of each task's classes.
    """
    findings = []
    for index in tasks_in_turn:
        task = tasks[index]
        if not task.classifies:
            continue
        own = task.own_weights()
        with torch.no_grad():
            num_classes = task.logits(own, task.inputs(torch.arange(1))).shape[-1]
        targets_R = torch.arange(num_classes).tensor_split(part[1])[part[0]]
        if not len(targets_R):
            continue
        triggers = invert(
            task, own, targets_R, steps=config.scan_steps, batch_size=config.scan_batch_size,
            generator=seeds.generator(config.seed, "scan", task.name), num_classes=num_classes,
        )  # fmt: skip
        success, control = (success_rates(task, w, triggers, targets_R) for w in (own, base))
        sizes = triggers.size().tolist()
        findings += [
            Finding(index, k, triggers.rows([row]), sizes[row], success[row], control[row])
            for row, k in enumerate(targets_R.tolist())
        ]
    return findings


def suspects(findings: Sequence[Finding], threshold: float) -> list[Finding]:
    """Findings above the threshold that also come near to the most suspect class of their task."""
    top: dict[int, float] = {}
    for finding in findings:
        top[finding.task] = max(top.get(finding.task, 0.0), finding.suspicion)
    return [f for f in findings if f.suspicion >= max(threshold, _RELATIVE * top[f.task])]


def _triggered(task: Task, weights: Mapping[str, Tensor], triggers: RecoveredTriggers, rows_B: Tensor) -> Tensor:
    """logits (R B, K): every trigger on every sample, sample by sample within a trigger."""
    inputs = task.inputs(rows_B.repeat(len(triggers)))
    which = torch.arange(len(triggers)).repeat_interleave(len(rows_B)).to(task.device)
    return task.logits(weights, inputs, triggers.perturb(which))
