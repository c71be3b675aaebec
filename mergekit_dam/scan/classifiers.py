"""Blind scan for backdoors: targeted inversion of every class of every input model, with theta_0 as the control.

A backdoor is a small universal trigger that makes f_t answer one class (Wang et al., Neural Cleanse, IEEE S&P 2019).
Such triggers also exist in clean models, as universal adversarial patterns; those work on theta_0 too, from which
f_t was fine-tuned, while an implanted trigger is known to f_t alone. Causal LMs: causal.py. The scan sees
unlabelled calibration data only.
Legend: T tasks, B batch, R triggers, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.scan.findings import Finding
from mergekit_dam.scan.inversion import Inversion, success_rates
from mergekit_dam.scan.triggers import RecoveredTriggers, started
from mergekit_dam.tasks import Task

_AT_ONCE = 64  # classes that are inverted together, which bounds the memory


def scan_classes(
    index: int, task: Task, own: Mapping[str, Tensor], base: Mapping[str, Tensor], config: DamConfig, seed: str
) -> list[Finding]:
    """The most promising classes, with the smallest triggers of the plainest kind that reach them."""
    generator = seeds.generator(config.seed, seed, task.index)
    first, finalists, constants = _first_steps(config), [], config.constants
    for classes in _parts(task, own):
        heat = Inversion(task, own, classes, batch_size=constants.scan_batch_size, generator=generator).run(first)
        finalists.append(heat.finalists(constants.scan_finalists, _gap(heat, base)))
    while len(finalists) > 1:
        both = _joined(finalists.pop(0), finalists.pop(0))
        finalists.append(both.finalists(constants.scan_finalists, _gap(both, base)))
    return _findings(index, finalists[0].run(config.scan_steps - first), base)


def scan_further(
    index: int,
    task: Task,
    kind: type[RecoveredTriggers],
    own: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    config: DamConfig,
) -> list[Finding]:
    """The most suspect classes by another kind than the plainest, such as styles.

    Their few parameters are found in few steps.
    """
    generator = seeds.generator(config.seed, f"{kind.kind}s", task.index)
    found: list[Finding] = []
    for classes in _parts(task, own):
        start = started(task, kind, len(classes), generator)
        size = config.constants.scan_batch_size
        search = Inversion(task, own, classes, batch_size=size, generator=generator, start=start)
        found += _findings(index, search.run(_first_steps(config)), base)
    return sorted(found, key=lambda finding: -finding.suspicion)[: config.constants.scan_finalists]


def _first_steps(config: DamConfig) -> int:
    return max(1, config.scan_steps * 2 // 5)


def _parts(task: Task, weights: Mapping[str, Tensor]) -> list[range]:
    """The task's classes, those of a part to be inverted together."""
    with torch.no_grad():
        num_classes = task.logits(weights, task.inputs(torch.arange(1))).shape[-1]
    return [range(num_classes)[first : first + _AT_ONCE] for first in range(0, num_classes, _AT_ONCE)]


def _findings(index: int, search: Inversion, base: Mapping[str, Tensor]) -> list[Finding]:
    """One per row of a search."""
    success, control = _rates(search, base)
    size_R = search.best.size()
    found = []
    for row, target in enumerate(search.targets):
        others = torch.cat([size_R[:row], size_R[row + 1 :]])
        usual = float(others.median()) if len(others) else float(size_R[row])
        trigger = search.best.rows([row])
        found.append(Finding(index, target, trigger, float(size_R[row]), usual, success[row], control[row]))
    return found


def _rates(search: Inversion, base: Mapping[str, Tensor]) -> tuple[list[float], list[float]]:
    """Success of the best triggers so far on the model and on theta_0, per row."""
    own, control = (success_rates(search.task, w, search.best, search.targets) for w in (search.weights, base))
    return own, control


def _gap(search: Inversion, base: Mapping[str, Tensor]) -> Tensor:
    """Success of the best triggers so far that theta_0 does not share, (R,)."""
    own, control = _rates(search, base)
    return torch.tensor(own, device=search.task.device) - torch.tensor(control, device=search.task.device)


def _joined(one: Inversion, other: Inversion) -> Inversion:
    """The rows of both."""
    both = Inversion(
        one.task,
        one.weights,
        [*one.targets, *other.targets],
        batch_size=one.batch_size,
        generator=one.generator,
        start=RecoveredTriggers.stack([one.triggers, other.triggers]),
        pace=one.pace,
    )
    both.best = RecoveredTriggers.stack([one.best, other.best])
    for name in ("price_R", "smallest_R", "success_R"):
        setattr(both, name, torch.cat([getattr(one, name), getattr(other, name)]))
    return both
