"""Scan of classifiers: invert every class of one model to its smallest trigger, and compare with theta_0.

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
from mergekit_dam.scan.triggers import TriggerBatch, kinds_of, started
from mergekit_dam.tasks import Task

_AT_ONCE = 64  # classes that are inverted together, which bounds the memory


def search_classes(
    index: int, task: Task, weights: Mapping[str, Tensor], base: Mapping[str, Tensor], config: DamConfig
) -> list[Finding]:
    """Search all classes of a task in some weights by each kind of trigger.

    Args:
        index, task, base, config: as for `scan_classes`.
        weights: of the model, or of what stands for it, by output name.
    """
    findings = scan_classes(index, task, weights, base, config, "scan")
    for kind in kinds_of(task)[1:]:
        findings += scan_further(index, task, kind, weights, base, config)
    return findings


def scan_classes(
    index: int, task: Task, own: Mapping[str, Tensor], base: Mapping[str, Tensor], config: DamConfig, seed: str
) -> list[Finding]:
    """Search all classes of a model for the smallest triggers of the plainest kind, the finalists to the end.

    Args:
        index: of the task.
        task: its forward pass and samples.
        own: weights of the model that is scanned, by output name.
        base: theta_0 by output name.
        config: `scan_steps`, `scan_batch_size`, `scan_finalists`, `seed`.
        seed: of this search, beside the setting's and the task's.
    """
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
    kind: type[TriggerBatch],
    own: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    config: DamConfig,
) -> list[Finding]:
    """Search all classes of a model for triggers of a further kind, and keep the most suspect ones.

    Such a kind, e.g. styles, has so few parameters that few steps find them.

    Args:
        kind: of the triggers.
        index, task, own, base, config: as for `scan_classes`.
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
    """Split the task's classes into parts that are inverted together."""
    with torch.no_grad():
        num_classes = task.logits(weights, task.inputs(torch.arange(1))).shape[-1]
    return [range(num_classes)[first : first + _AT_ONCE] for first in range(0, num_classes, _AT_ONCE)]


def _findings(index: int, search: Inversion, base: Mapping[str, Tensor]) -> list[Finding]:
    """One finding per row of a search."""
    success, base_success = _rates(search, base)
    size_R = search.best.size()
    findings = []
    for row, target in enumerate(search.targets):
        others = torch.cat([size_R[:row], size_R[row + 1 :]])
        median_size = float(others.median()) if len(others) else float(size_R[row])
        trigger = search.best.rows([row])
        numbers = float(size_R[row]), median_size, success[row], base_success[row]
        findings.append(Finding(index, target, trigger, *numbers))
    return findings


def _rates(search: Inversion, base: Mapping[str, Tensor]) -> tuple[list[float], list[float]]:
    """Success of the best triggers so far on the model and on theta_0, per row."""
    own, base_success = (success_rates(search.task, w, search.best, search.targets) for w in (search.weights, base))
    return own, base_success


def _gap(search: Inversion, base: Mapping[str, Tensor]) -> Tensor:
    """Success of the best triggers so far that theta_0 does not share, (R,)."""
    own, base_success = _rates(search, base)
    return torch.tensor(own, device=search.task.device) - torch.tensor(base_success, device=search.task.device)


def _joined(one: Inversion, other: Inversion) -> Inversion:
    """Join two searches into one that has the rows of both."""
    both = Inversion(
        one.task,
        one.weights,
        [*one.targets, *other.targets],
        batch_size=one.batch_size,
        generator=one.generator,
        start=TriggerBatch.stack([one.triggers, other.triggers]),
        pace=one.pace,
    )
    both.best = TriggerBatch.stack([one.best, other.best])
    for name in ("price_R", "smallest_R", "success_R"):
        setattr(both, name, torch.cat([getattr(one, name), getattr(other, name)]))
    return both
