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
_CHECKED = 128  # samples that success is measured on
_AT_ONCE = 64  # classes that are inverted together, which bounds the memory


@dataclass(frozen=True)
class Pace:
    """Of an inversion: Adam's step, the price of a unit of size at the start, and its factors per step."""

    learning_rate: float
    price: float
    rise: float
    fall: float


LEAN = Pace(0.2, 1e-2, 1.3, 1.3)
WIDE = Pace(0.1, 1e-3, 1.12, 1.25)


@dataclass(frozen=True, eq=False)
class Finding:
    """What the scan found for one class of one model.

    Attributes:
        task: the model's index.
        target: the class.
        trigger: the recovered trigger, one row.
        size: in pixels, or in units of the embedding range.
        usual: median size of the task's other finalists.
        success: share of calibration samples that f_t gives the target with the trigger.
        control: the same share for theta_0 with the head of t.
    """

    task: int
    target: int
    trigger: RecoveredTriggers
    size: float
    usual: float
    success: float
    control: float

    @property
    def suspicion(self) -> float:
        """Success that theta_0 does not share, and half of what the trigger lacks of the usual size; -1..1.5."""
        return self.success - self.control + 0.5 * max(0.0, 1.0 - self.size / max(self.usual, 1e-6))

    def to_json(self, name: str) -> dict[str, Any]:
        """Numbers for the artefact and the log."""
        rounded = {k: round(float(getattr(self, k)), 4) for k in ("size", "usual", "success", "control", "suspicion")}
        return {"task": name, "target": self.target, **rounded}


class Inversion:
    """Targeted inversion of several classes of one model at once: smallest universal triggers, found by Adam.

    The price of size rises while a trigger works on 95 % of the last batches and falls otherwise; Wang et al.
    (section IV.B) wait for several batches instead. Fast prices give the smallest triggers: among them the implanted
    ones stand out. Slow ones leave triggers wide: they hold more of what a backdoor reacts to, and that is what
    masks must be fitted against (benchmarks/STUDY.md).

    Args:
        task: forward pass and calibration samples.
        weights: of the model that is inverted, by output name.
        targets_R: class of each row.
        batch_size: samples per row and step.
        generator: of batches, and of the start.
        start: triggers to go on from; None: random ones.
        pace: how fast prices and triggers move.
    """

    def __init__(
        self, task: Task, weights: Mapping[str, Tensor], targets_R: Tensor, *,
        batch_size: int, generator: torch.Generator, start: RecoveredTriggers | None = None, pace: Pace = LEAN,
    ) -> None:  # fmt: skip
        self.task, self.generator, self.targets_R = task, generator, targets_R
        self.weights = fixed(weights)
        self.batch_size = min(batch_size, task.num_samples)
        count = len(targets_R)
        start = start or RecoveredTriggers.start(count, task.perturbation_shape, task.bounds, generator)
        self.triggers = RecoveredTriggers(
            [p.detach().clone().requires_grad_(True) for p in start.parameters], task.bounds
        )
        self.optimiser = torch.optim.Adam(self.triggers.parameters, lr=pace.learning_rate, betas=(0.5, 0.9))
        self.best = self.triggers.rows(range(count))
        self.pace, self.price_R = pace, torch.full((count,), pace.price, device=task.device)
        self.smallest_R = torch.full_like(self.price_R, torch.inf)
        self.success_R = torch.full_like(self.price_R, 0.5)

    def run(self, steps: int) -> Inversion:
        """Go on for some steps; returns itself."""
        for _ in range(steps):
            self._step()
        return self

    def _step(self) -> None:
        task, triggers, count = self.task, self.triggers, len(self.targets_R)
        rows_B = torch.randint(task.num_samples, (self.batch_size,), generator=self.generator)
        logits = _triggered(task, self.weights, triggers, rows_B)
        targets = self.targets_R.to(task.device).repeat_interleave(len(rows_B))
        losses_R = F.cross_entropy(logits, targets, reduction="none").view(count, -1).mean(1)
        size_R = triggers.size()
        gradients = torch.autograd.grad((losses_R + self.price_R * size_R).sum(), triggers.parameters)
        hits_R = (logits.argmax(-1) == targets).float().view(count, -1).mean(1)
        self.success_R = 0.7 * self.success_R + 0.3 * hits_R
        works_R = self.success_R >= SUCCESS
        with torch.no_grad():
            better_R = works_R & (size_R < self.smallest_R)
            self.smallest_R = torch.where(better_R, size_R, self.smallest_R)
            kept_R = better_R | self.smallest_R.isinf()
            for kept, now, gradient in zip(self.best.parameters, triggers.parameters, gradients, strict=True):
                kept[kept_R] = now[kept_R]
                now.grad = gradient
        self.price_R = torch.where(works_R, self.price_R * self.pace.rise, self.price_R / self.pace.fall).clamp(
            1e-5, 10.0
        )
        self.optimiser.step()

    def finalists(self, count: int) -> Inversion:
        """The most promising rows, to go on with: the smallest that worked, then the most successful."""
        score_R = torch.where(self.smallest_R.isinf(), -self.success_R, -2.0 - 1.0 / (1.0 + self.smallest_R))
        rows = score_R.argsort()[:count].sort().values
        chosen = Inversion(
            self.task, self.weights, self.targets_R[rows.cpu()], batch_size=self.batch_size, generator=self.generator,
            start=self.triggers.rows(rows.tolist()),
        )  # fmt: skip
        chosen.best = self.best.rows(rows.tolist())
        chosen.price_R, chosen.smallest_R, chosen.success_R = (
            values[rows] for values in (self.price_R, self.smallest_R, self.success_R)
        )
        return chosen


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
    """The most suspect classes of every model that classifies, at most `scan_finalists` of each.

    All classes are searched for two fifths of `scan_steps`, the finalists for the rest: sooner, small triggers of
    classes that are easy to reach anyway do not stand out yet.

    Args:
        tasks: one per model.
        base: theta_0 by output name.
        config: `scan_steps`, `scan_batch_size`, `scan_finalists`, `seed`.
        tasks_in_turn: their indices, wrapped in a progress bar.
    """
    findings = []
    for index in tasks_in_turn:
        if tasks[index].classifies:
            findings += _scan_one(index, tasks[index], base, config)
    return findings


def _scan_one(index: int, task: Task, base: Mapping[str, Tensor], config: DamConfig) -> list[Finding]:
    own = task.own_weights()
    with torch.no_grad():
        num_classes = task.logits(own, task.inputs(torch.arange(1))).shape[-1]
    generator = seeds.generator(config.seed, "scan", task.name)
    first, finalists = max(1, config.scan_steps * 2 // 5), []
    for targets_R in torch.arange(num_classes).split(_AT_ONCE):
        heat = Inversion(task, own, targets_R, batch_size=config.scan_batch_size, generator=generator).run(first)
        finalists.append(heat.finalists(config.scan_finalists))
    while len(finalists) > 1:
        finalists.append(_joined(finalists.pop(0), finalists.pop(0)).finalists(config.scan_finalists))
    final = finalists[0].run(config.scan_steps - first)
    success, control = (success_rates(task, w, final.best, final.targets_R) for w in (own, base))
    size_R = final.best.size()
    found = []
    for row, target in enumerate(final.targets_R.tolist()):
        others = torch.cat([size_R[:row], size_R[row + 1 :]])
        usual = float(others.median()) if len(others) else float(size_R[row])
        trigger = final.best.rows([row])
        found.append(Finding(index, target, trigger, float(size_R[row]), usual, success[row], control[row]))
    return found


def _joined(one: Inversion, other: Inversion) -> Inversion:
    """The rows of both."""
    both = Inversion(
        one.task, one.weights, torch.cat([one.targets_R, other.targets_R]), batch_size=one.batch_size,
        generator=one.generator, start=RecoveredTriggers.stack([one.triggers, other.triggers]),
    )  # fmt: skip
    both.best = RecoveredTriggers.stack([one.best, other.best])
    for name in ("price_R", "smallest_R", "success_R"):
        setattr(both, name, torch.cat([getattr(one, name), getattr(other, name)]))
    return both


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
