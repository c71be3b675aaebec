"""Blind scan for backdoors: targeted inversion of every class of every input model, with theta_0 as the control.

A backdoor is a small universal trigger that makes f_t answer one class (Wang et al., Neural Cleanse, IEEE S&P 2019).
Such triggers also exist in clean models, as universal adversarial patterns; those work on theta_0 too, from which
f_t was fine-tuned, while an implanted trigger is known to f_t alone. Causal LMs: causal.py. The scan sees
unlabelled calibration data only.
Legend: T tasks, B batch, R triggers, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.scan.causal import scan_continuations
from mergekit_dam.scan.cross_task import carriers, untouched, weights_of_other, weights_of_others
from mergekit_dam.scan.findings import Finding, averaged
from mergekit_dam.scan.inversion import Inversion, success_rates
from mergekit_dam.scan.triggers import RecoveredTriggers, Styles, kinds_for
from mergekit_dam.tasks import CausalTask, Task

LOG = logging.getLogger(__name__)
_UNDEFENDED = (
    "dam: model %s is a text encoder, whose backdoors the scan does not find: a low score says nothing. What protects "
    "is to merge students of such models, as `dam` does unless student_steps is 0 (docs/threat-model.md)."
)
_AT_ONCE = 64  # classes that are inverted together, which bounds the memory
_AGAIN = 2  # further searches, where one nearly says that another model is to blame
_NEARLY = 0.75  # of the threshold


def scan(
    tasks: Sequence[Task], base: Mapping[str, Tensor], config: DamConfig, tasks_in_turn: Iterable[int]
) -> list[Finding]:
    """The most suspect classes or continuations of every model, at most `scan_finalists` of each.

    With `scan_others` the classes of a task are searched a second time with all other models in place of its own.

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
        task = tasks[index]
        if not task.defended:
            LOG.warning(_UNDEFENDED, task.name)
        if isinstance(task, CausalTask):
            findings += scan_continuations(index, task, base, config)
        else:
            own = task.own_weights()
            findings += _scan_classes(index, task, own, base, config, "scan")
            if Styles in kinds_for(task.perturbation_shape):
                findings += _scan_styles(index, task, own, base, config)
            if config.scan_others and task.defended and len(tasks) > 1:
                findings += _scan_others(index, tasks, base, config)
    return findings


def _scan_others(index: int, tasks: Sequence[Task], base: Mapping[str, Tensor], config: DamConfig) -> list[Finding]:
    """What all other models bring to a task, each finding with the model whose doing it is.

    What is a model's doing works with it alone, so the lower success counts; side effects of a planted trigger, and
    what several clean models bring about together, work less well then.

    What is nearly suspect is searched again with other batches, and the means count: even among clean models some
    class of another's task is easier to reach, and with few samples single searches differ much.
    """
    task, others = tasks[index], weights_of_others(tasks, index, base)
    found = _others_once(index, task, others, base, config, "others")
    owners = carriers(tasks, index, base, [(one.trigger, one.target) for one in found])
    findings = [_laid(one, owner, share) for one, (owner, share) in zip(found, owners, strict=True)]
    limit = _NEARLY * config.suspicion
    if all(one.suspicion < limit for one in findings):
        return findings
    searches = [
        {one.target: one for one in _others_once(index, task, others, base, config, f"others {n}")}
        for n in range(_AGAIN)
    ]

    def again(one: Finding) -> list[Finding | None]:
        assert one.carrier is not None, "just laid to it"
        weights = weights_of_other(task, tasks[one.carrier], base)
        theirs = [search.get(one.target) for search in searches]
        return [
            None
            if more is None
            else _laid(more, one.carrier, success_rates(task, weights, more.trigger, [more.target])[0])
            for more in theirs
        ]

    return [averaged(one, again(one)) if one.suspicion >= limit else one for one in findings]


def _laid(found: Finding, carrier: int, share: float) -> Finding:
    """A finding laid to a model, with which alone the trigger has this success."""
    return replace(found, carrier=carrier, success=min(found.success, share))


def _others_once(
    index: int, task: Task, others: Mapping[str, Tensor], base: Mapping[str, Tensor], config: DamConfig, seed: str
) -> list[Finding]:
    """One search, which knows no carrier yet; the control is at least what is answered without a trigger."""
    findings = _scan_classes(index, task, others, base, config, seed)
    plain = untouched(task, others, [found.target for found in findings])
    return [replace(found, control=max(found.control, share)) for found, share in zip(findings, plain, strict=True)]


def _scan_classes(
    index: int, task: Task, own: Mapping[str, Tensor], base: Mapping[str, Tensor], config: DamConfig, seed: str
) -> list[Finding]:
    """The most promising classes, with the smallest triggers of the plainest kind that reach them."""
    generator = seeds.generator(config.seed, seed, task.name)
    first, finalists = _first_steps(config), []
    for classes in _parts(task, own):
        heat = Inversion(task, own, classes, batch_size=config.scan_batch_size, generator=generator).run(first)
        finalists.append(heat.finalists(config.scan_finalists, _gap(heat, base)))
    while len(finalists) > 1:
        both = _joined(finalists.pop(0), finalists.pop(0))
        finalists.append(both.finalists(config.scan_finalists, _gap(both, base)))
    return _findings(index, finalists[0].run(config.scan_steps - first), base)


def _scan_styles(
    index: int, task: Task, own: Mapping[str, Tensor], base: Mapping[str, Tensor], config: DamConfig
) -> list[Finding]:
    """The most suspect classes by changes of style; so few parameters are found in few steps."""
    generator = seeds.generator(config.seed, "styles", task.name)
    found: list[Finding] = []
    for classes in _parts(task, own):
        start = Styles.start(len(classes), task.perturbation_shape, task.bounds, generator)
        search = Inversion(
            task, own, classes, batch_size=config.scan_batch_size, generator=generator, start=start
        ).run(_first_steps(config))  # fmt: skip
        found += _findings(index, search, base)
    return sorted(found, key=lambda finding: -finding.suspicion)[: config.scan_finalists]


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
        one.task, one.weights, [*one.targets, *other.targets], batch_size=one.batch_size,
        generator=one.generator, start=RecoveredTriggers.stack([one.triggers, other.triggers]),
    )  # fmt: skip
    both.best = RecoveredTriggers.stack([one.best, other.best])
    for name in ("price_R", "smallest_R", "success_R"):
        setattr(both, name, torch.cat([getattr(one, name), getattr(other, name)]))
    return both
