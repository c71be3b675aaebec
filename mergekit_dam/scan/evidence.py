"""Evidence for a finding: what its trigger does to the suspect, to theta_0, to the other models, and to the merge.

A score is one number; who must decide on it needs to see where the trigger works and where it does not. The references
are theta_0 and, where it is not accused itself, the task's own model. Models of other tasks say less: read by a head
that they were not trained with, clean ones can be moved by a trigger as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_dam.scan.cross_task import success_without_trigger, weights_from
from mergekit_dam.scan.findings import Finding
from mergekit_dam.scan.inversion import success_rates
from mergekit_dam.tasks import Task

Role = Literal["merge", "model", "base", "own", "other"]


@torch.no_grad()
def evidence(
    finding: Finding, tasks: Sequence[Task], base: Mapping[str, Tensor], merge: Mapping[str, Tensor] | None = None
) -> list[dict[str, Any]]:
    """Measure the trigger of a finding on all weights at hand, each read by the head of the finding's task.

    Args:
        finding: of a scan of the input models, or of the merge.
        tasks: of the input models.
        base: theta_0 by output name.
        merge: weights of the merge, if it was scanned.

    Returns:
        One row each, as JSON: first what the finding accuses, then theta_0, the task's own model and those of other
        tasks. `role` is `merge`, `model` (the accused one), `base`, `own` or `other`, and `name` the model's.
        `success` is the share of calibration samples with the trigger that are answered with the target, `plain` the
        same without the trigger (None of continuations).
    """
    task, target = tasks[finding.task], finding.target
    rows = []
    for role, name, weights in _bodies(finding, tasks, base, merge):
        (success,) = success_rates(task, weights, finding.trigger, [target])
        plain = success_without_trigger(task, weights, [target])[0] if isinstance(target, int) else None
        shares = {"success": round(success, 4), "plain": None if plain is None else round(plain, 4)}
        rows.append({"role": role, "name": name, **shares})
    return rows


def _bodies(
    finding: Finding, tasks: Sequence[Task], base: Mapping[str, Tensor], merge: Mapping[str, Tensor] | None
) -> Iterator[tuple[Role, str, Mapping[str, Tensor]]]:
    """Yield role, name and weights, one set of weights at a time."""
    task = tasks[finding.task]
    accused = None if merge is not None else finding.model
    if merge is not None:
        yield "merge", "merge", task.with_weights(merge).own_weights()
    else:
        yield "model", tasks[finding.model].name, _own(task, tasks[finding.model], base)
    yield "base", "base", base
    if finding.task != accused:
        yield "own", task.name, task.own_weights()
    for index, other in enumerate(tasks):
        if index not in (accused, finding.task):
            yield "other", other.name, _own(task, other, base)


def _own(task: Task, source: Task, base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return task.own_weights() if source is task else weights_from(task, source, base)
