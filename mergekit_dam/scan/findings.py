"""What a scan finds, from when on it is suspect, and what is fitted against then. R triggers, one per row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

from mergekit_dam import seeds
from mergekit_dam.constants import Constants
from mergekit_dam.scan.triggers import RecoveredTriggers, kinds_of, started
from mergekit_dam.tasks import Target, Task


class Suspect(NamedTuple):
    """What tells findings apart.

    Attributes:
        task: index of the task whose head and samples are used.
        target: a class, or the token ids of a continuation.
        carrier: index of the model whose doing it is, where that is not the task's own (cross_task.py).
        kind: of the trigger (triggers.py).
    """

    task: int
    target: Target
    carrier: int | None
    kind: str


@dataclass(frozen=True, eq=False)
class Finding:
    """What the scan found for one target of one task.

    Attributes:
        task: the task's index, and its own model's.
        target: a class, or the token ids of a continuation.
        trigger: the recovered trigger, one row.
        size: in pixels, in units of the embedding range, or a continuation's length in tokens.
        usual: median size of the task's other finalists; a continuation's own.
        success: share of calibration samples that f_t gives the class with the trigger; of a continuation, the mean
            probability that f_t gives each further token of it once it has begun. With a carrier, f_t is the sum of
            all models but the task's own, or the carrier alone where that is less.
        control: the same for theta_0, with the head of t; with a carrier, or without a trigger if that is more.
        carrier: see `Suspect`.
        scale: factor of the suspicion with a carrier (`cross_task_scale`).
    """

    task: int
    target: Target
    trigger: RecoveredTriggers
    size: float
    usual: float
    success: float
    control: float
    carrier: int | None = None
    scale: float = 1.0

    @property
    def key(self) -> Suspect:
        """What tells it from other findings."""
        return Suspect(self.task, self.target, self.carrier, self.trigger.kind)

    @property
    def model(self) -> int:
        """Index of the model that it speaks against."""
        return self.task if self.carrier is None else self.carrier

    @property
    def suspicion(self) -> float:
        """Success that theta_0 does not share, and half of what the trigger lacks of the usual size; -1..1.5.

        A style counts the less the nearer it is to the largest there can be. With a carrier both must speak against the
        model, and the weaker one counts, times `scale`: even clean models make some class of others' tasks easier to
        reach.
        """
        gap, largest = self.success - self.control, self.trigger.largest
        if largest < math.inf:
            return gap * (1.0 - self.size / largest)
        small = 0.5 * max(0.0, 1.0 - self.size / max(self.usual, 1e-6))
        return gap + small if self.carrier is None else self.scale * min(gap, small)

    @property
    def numbers(self) -> dict[str, float]:
        """What was measured, rounded."""
        names = ("size", "usual", "success", "control", "suspicion")
        return {name: round(float(getattr(self, name)), 4) for name in names}

    def to_json(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """For the artefact and the log."""
        task = tasks[self.task]
        names = {"model": tasks[self.model].name, "task": task.name, "target": task.words_of(self.target)}
        return names | {"kind": self.trigger.kind} | self.numbers


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """By task and class, a task's own first: the order that does not depend on who scanned what."""
    return sorted(findings, key=lambda f: (f.task, f.carrier is not None, f.trigger.kind, f.target))


def averaged(found: Finding, again: Sequence[Finding | None]) -> Finding:
    """A finding with the means of what several searches for it measured, and its own trigger.

    Args:
        again: of further searches; None where the target was not among their finalists, which speaks for no backdoor:
            a trigger of the usual size that works on theta_0 as well.
    """
    missing = replace(found, size=found.usual, success=found.control)
    every = [found, *(one or missing for one in again)]
    return replace(
        found,
        size=fmean(one.size for one in every),
        usual=fmean(one.usual for one in every),
        success=fmean(one.success for one in every),
        control=fmean(one.control for one in every),
    )


def suspects(findings: Sequence[Finding], threshold: float, constants: Constants) -> list[Finding]:
    """Findings above the threshold that also come near to the most suspect one of their task.

    A stamp that is not small may stand for what is no stamp, such as a warp: then the style of the same target counts
    as well, if it speaks against the model too; beside a small stamp only if it does so clearly, since to fit against
    both costs accuracy (benchmarks/STUDY.md).

    With a carrier, the most suspect one of each task that it speaks of, also where the model is suspect in its own:
    that trigger may be a decoy. Side effects of a trigger look alike, but seldom come up to the threshold; to fit
    against one costs accuracy, to overlook a decoy costs the task (benchmarks/STUDY.md).
    """
    own = [f for f in findings if f.carrier is None]
    top: dict[int, float] = {}
    for finding in own:
        top[finding.task] = max(top.get(finding.task, 0.0), finding.suspicion)
    found = [f for f in own if f.suspicion >= max(threshold, constants.near_the_top * top[f.task])]
    beside = {
        (f.task, f.target): constants.style_beside_large * threshold
        if f.size > constants.large_stamp * f.usual
        else max(constants.style_beside_small, threshold)
        for f in found
        if f.trigger.largest == math.inf
    }
    found += [f for f in own if f not in found and f.suspicion >= beside.get((f.task, f.target), math.inf)]
    worst: dict[tuple[int, int], Finding] = {}
    for finding in findings:
        if finding.carrier is not None and finding.suspicion >= threshold:
            pair = finding.model, finding.task
            worst[pair] = max(worst.get(pair, finding), finding, key=lambda f: f.suspicion)
    return found + list(worst.values())


def blank(task: Task, kind: str) -> RecoveredTriggers:
    """One trigger of a kind for a task, to be filled."""
    return started(task, kind_of(task, kind), 1, seeds.generator("blank"))


def kind_of(task: Task, name: str) -> type[RecoveredTriggers]:
    """The kind of this name among those of a task."""
    return next(kind for kind in kinds_of(task) if kind.kind == name)


_NUMBERS = ("task", "target", "size", "usual", "success", "control", "carrier", "scale")


def target_of(stored: int | list[int]) -> Target:
    """A target as JSON has it."""
    return tuple(stored) if isinstance(stored, list) else stored


def facts_of(finding: Finding) -> dict[str, Any]:
    """A finding without its trigger, as JSON."""
    return {name: getattr(finding, name) for name in _NUMBERS} | {"kind": finding.trigger.kind}


def blank_finding(tasks: Sequence[Task], facts: Mapping[str, Any]) -> Finding:
    """A finding whose trigger is still to be filled, from `facts_of`."""
    numbers = {name: facts[name] for name in _NUMBERS}
    return Finding(
        trigger=blank(tasks[facts["task"]], facts["kind"]), **{**numbers, "target": target_of(facts["target"])}
    )
