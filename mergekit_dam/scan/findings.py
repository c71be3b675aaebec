"""Findings of the scan: their numbers, their suspicion, and which of them masks are fitted against."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

from mergekit_dam import seeds
from mergekit_dam.constants import Constants
from mergekit_dam.scan.triggers import TriggerBatch, kinds_of, started
from mergekit_dam.tasks import Target, Task


class Suspect(NamedTuple):
    """The key of a finding: two findings of one scan never share it.

    Attributes:
        task: index of the task whose head and samples are used.
        target: a class, or the token ids of a continuation.
        source_model: index of the model that the finding is attributed to; None for the task's own (cross_task.py).
        kind: of the trigger (triggers.py).
    """

    task: int
    target: Target
    source_model: int | None
    kind: str


@dataclass(frozen=True, eq=False)
class Finding:
    """One target of one task, with the trigger that the scan recovered for it and how well that works.

    Attributes:
        task: the task's index, and its own model's.
        target: a class, or the token ids of a continuation.
        trigger: the recovered trigger, one row.
        size: in pixels, in units of the embedding range, or a continuation's length in tokens.
        median_size: of the task's other finalists; a continuation's own.
        success: share of calibration samples that f_t gives the class with the trigger; of a continuation, the mean
            probability that f_t gives each further token of it once it has begun, but those that it says openly. With a
            source model, f_t is the merge of all models but the task's own, or the source model alone where that is
            less.
        base_success: the same for theta_0, with the head of t; with a source model, or without a trigger if that is
            more.
        source_model: see `Suspect`.
        scale: factor of the suspicion: with a source model (`cross_task_scale`), and of a short continuation.
        shared: in audits, suspicion that the model's clean twin has as well, beyond `twin_allowance` (twin.py).
    """

    task: int
    target: Target
    trigger: TriggerBatch
    size: float
    median_size: float
    success: float
    base_success: float
    source_model: int | None = None
    scale: float = 1.0
    shared: float = 0.0

    @property
    def key(self) -> Suspect:
        """Task, target, source model and kind."""
        return Suspect(self.task, self.target, self.source_model, self.trigger.kind)

    @property
    def model(self) -> int:
        """Index of the model that the finding makes suspect."""
        return self.task if self.source_model is None else self.source_model

    @property
    def suspicion(self) -> float:
        """Success that theta_0 does not share, and half of what the trigger lacks of the median size, less `shared`.

        A style counts the less the nearer it is to the largest there can be. With a source model both must speak
        against that model, and the weaker one counts: even clean models make some class of others' tasks easier to
        reach. All but styles are multiplied by `scale`.
        """
        gap, largest = self.success - self.base_success, self.trigger.largest
        if largest < math.inf:
            return gap * (1.0 - self.size / largest) - self.shared
        small = 0.5 * max(0.0, 1.0 - self.size / max(self.median_size, 1e-6))
        return self.scale * (gap + small if self.source_model is None else min(gap, small)) - self.shared

    @property
    def numbers(self) -> dict[str, float]:
        """The measured numbers, rounded, by their keys in files."""
        measured = {
            "size": self.size,
            "usual": self.median_size,
            "success": self.success,
            "control": self.base_success,
            "suspicion": self.suspicion,
        }
        return {key: round(float(value), 4) for key, value in measured.items()}

    def to_json(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """The finding with names in place of indices, as masks files, reports and the log have it."""
        task = tasks[self.task]
        names = {"model": tasks[self.model].name, "task": task.name, "target": task.words_of(self.target)}
        return names | {"kind": self.trigger.kind} | self.numbers


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Sort findings by task, kind and target, a task's own first, whichever process scanned them."""
    return sorted(findings, key=lambda f: (f.task, f.source_model is not None, f.trigger.kind, f.target))


def mean_of_searches(first: Finding, further: Sequence[Finding | None]) -> Finding:
    """Replace the numbers of a finding by their means over several searches; its trigger stays.

    Args:
        first: the finding of the first search.
        further: of the same target, one per further search; None where the target was not among the finalists. That
            speaks for no backdoor and counts as a trigger of the median size that works on theta_0 as well.
    """
    missing = replace(first, size=first.median_size, success=first.base_success)
    searches = [first, *(finding or missing for finding in further)]
    return replace(
        first,
        size=fmean(finding.size for finding in searches),
        median_size=fmean(finding.median_size for finding in searches),
        success=fmean(finding.success for finding in searches),
        base_success=fmean(finding.base_success for finding in searches),
    )


def suspects(findings: Sequence[Finding], threshold: float, constants: Constants) -> list[Finding]:
    """Choose the findings that make a model suspect: above the threshold, and near the task's most suspect one.

    A patch that is not small may stand for what is no patch, such as a warp. Then the style of the same target counts
    as well, if it speaks against the model too; beside a small patch only if it does so clearly, since to fit against
    both costs accuracy (benchmarks/STUDY.md).

    Of attributed findings, the most suspect one per source model and task counts, also where that model is suspect in
    its own task: that trigger may be a decoy. Side effects of a trigger look alike, but seldom come up to the
    threshold; to fit against one costs accuracy, to overlook a decoy costs the task (benchmarks/STUDY.md).

    Args:
        findings: of all tasks.
        threshold: the setting `suspicion`.
        constants: `near_the_top`, `large_stamp`, `style_beside_large`, `style_beside_small`.
    """
    own = [f for f in findings if f.source_model is None]
    top: dict[int, float] = {}
    for finding in own:
        top[finding.task] = max(top.get(finding.task, 0.0), finding.suspicion)
    found = [f for f in own if f.suspicion >= max(threshold, constants.near_the_top * top[f.task])]
    beside = {
        (f.task, f.target): constants.style_beside_large * threshold
        if f.size > constants.large_stamp * f.median_size
        else max(constants.style_beside_small, threshold)
        for f in found
        if f.trigger.largest == math.inf
    }
    found += [f for f in own if f not in found and f.suspicion >= beside.get((f.task, f.target), math.inf)]
    worst: dict[tuple[int, int], Finding] = {}
    for finding in findings:
        if finding.source_model is not None and finding.suspicion >= threshold:
            pair = finding.model, finding.task
            worst[pair] = max(worst.get(pair, finding), finding, key=lambda f: f.suspicion)
    return found + list(worst.values())


def blank(task: Task, kind: str) -> TriggerBatch:
    """One trigger of a kind for a task, whose parameters are still to be filled."""
    return started(task, kind_of(task, kind), 1, seeds.generator("blank"))


def kind_of(task: Task, name: str) -> type[TriggerBatch]:
    """The kind of this name among those of a task."""
    return next(kind for kind in kinds_of(task) if kind.kind == name)


# keys in scan files and snapshots -> fields: files keep the keys that they have always had
_KEYS = {
    "task": "task",
    "target": "target",
    "size": "size",
    "usual": "median_size",
    "success": "success",
    "control": "base_success",
    "carrier": "source_model",
    "scale": "scale",
}


def target_of(stored: int | list[int]) -> Target:
    """Convert a target from JSON, which has lists in place of tuples."""
    return tuple(stored) if isinstance(stored, list) else stored


def facts_of(finding: Finding) -> dict[str, Any]:
    """The finding without its trigger, as JSON for scan files and snapshots."""
    return {key: getattr(finding, field) for key, field in _KEYS.items()} | {"kind": finding.trigger.kind}


def blank_finding(tasks: Sequence[Task], facts: Mapping[str, Any]) -> Finding:
    """Rebuild a finding from `facts_of`; the parameters of its trigger are still to be filled."""
    fields = {field: facts[key] for key, field in _KEYS.items()} | {"target": target_of(facts["target"])}
    return Finding(trigger=blank(tasks[facts["task"]], facts["kind"]), **fields)
