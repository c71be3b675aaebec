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
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.inversion import Inversion, success_rates
from mergekit_dam.tasks import Task
from mergekit_dam.triggers import RecoveredTriggers

_RELATIVE = 0.75  # a class is suspect only if it comes this near to the most suspect one of its task
_AT_ONCE = 64  # classes that are inverted together, which bounds the memory


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


def scan(
    tasks: Sequence[Task], base: Mapping[str, Tensor], config: DamConfig, tasks_in_turn: Iterable[int]
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
        finalists.append(heat.finalists(config.scan_finalists, _gap(heat, base)))
    while len(finalists) > 1:
        both = _joined(finalists.pop(0), finalists.pop(0))
        finalists.append(both.finalists(config.scan_finalists, _gap(both, base)))
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


def _gap(search: Inversion, base: Mapping[str, Tensor]) -> Tensor:
    """Success of the best triggers so far that theta_0 does not share, (R,)."""
    own, control = (success_rates(search.task, w, search.best, search.targets_R) for w in (search.weights, base))
    return torch.tensor(own, device=search.task.device) - torch.tensor(control, device=search.task.device)


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
