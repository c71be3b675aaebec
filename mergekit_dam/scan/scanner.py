"""The scan: search every input model for backdoors by the scanner that its task names, from unlabelled data alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from mergekit_dam.config import DamConfig
from mergekit_dam.registry import SCANNERS
from mergekit_dam.scan.causal import scan_continuations
from mergekit_dam.scan.classifiers import search_classes
from mergekit_dam.scan.cross_task import scan_cross_task
from mergekit_dam.scan.findings import Finding
from mergekit_dam.tasks import Task, generates

_UNDEFENDED = "{}: the scan does not find the backdoors of {}: a low score says nothing."
_STUDENTS = (
    " What protects is to merge students of such models, as `dam` does unless student_steps is 0 "
    "(docs/threat-model.md)."
)


class KnownScan(Protocol):
    """A store for the findings about each task, so that audit and learning scan once (artifact/scan_file.py)."""

    def take(self, index: int) -> list[Finding] | None:
        """Load the findings about a task; None if these inputs were not scanned yet with these settings."""

    def keep(self, index: int, findings: Sequence[Finding], seconds: float) -> None:
        """Store the findings about a task, with the seconds that the scan took."""


def undefended(tasks: Sequence[Task]) -> list[str]:
    """Warn that the scan cannot find the backdoors of these models: a sentence or two per modality, or none."""
    notes = []
    for modality, what in (("text", "text encoders"), ("image", "such image models")):
        names = [task.name for task in tasks if not task.defended and task.modality == modality]
        if names:
            cure = _STUDENTS if modality == "text" else ""
            notes.append(_UNDEFENDED.format(", ".join(names), what) + cure)
    return notes


Scanner = Callable[[int, Sequence[Task], Mapping[str, Tensor], DamConfig], list[Finding]]
"""Scans the model of one task: its index, the tasks of all models, theta_0 by output name, settings -> findings."""


def register_scanner(name: str, scanner: Scanner) -> None:
    """Let tasks name a way to scan their models in `Task.scanner`.

    Args:
        name: a new one.
        scanner: a function of a task's index, the tasks of all models, theta_0 by output name and the settings. It
            returns the most suspect findings about that task, at most `scan_finalists` of each kind.

    Raises:
        DamError: the name is taken.
    """
    SCANNERS.add(name, scanner)


def scan(
    tasks: Sequence[Task],
    base: Mapping[str, Tensor],
    config: DamConfig,
    tasks_in_turn: Iterable[int],
    known: KnownScan | None = None,
) -> list[Finding]:
    """Scan models with the scanners that their tasks name, and collect the findings.

    Args:
        tasks: one per model.
        base: theta_0 by output name.
        config: `scan_steps`, `suspicion`, `seed`, and the constants of the scan.
        tasks_in_turn: their indices, wrapped in a progress bar.
        known: earlier scans, and where each one is kept as soon as it is done; None: nowhere.

    Raises:
        DamError: a task names an unknown scanner.
    """
    found: list[Finding] = []
    for index in tasks_in_turn:
        findings = known.take(index) if known is not None else None
        if findings is None:
            begun = time.perf_counter()
            findings = SCANNERS[tasks[index].scanner](index, tasks, base, config)
            if known is not None:
                known.keep(index, findings, round(time.perf_counter() - begun, 3))
        found += findings
    return found


def _classes(index: int, tasks: Sequence[Task], base: Mapping[str, Tensor], config: DamConfig) -> list[Finding]:
    """Scan a classifier: its classes by each kind of trigger, then with all other models in place of its own.

    All classes are searched for two fifths of `scan_steps`, the `scan_finalists` for the rest: sooner, small triggers
    of classes that are easy to reach anyway do not stand out yet.
    """
    task = tasks[index]
    findings = search_classes(index, task, task.own_weights(), base, config)
    if config.constants.scan_others and task.defended and len(tasks) > 1:
        findings += scan_cross_task(index, tasks, base, config)
    return findings


def _continuations(index: int, tasks: Sequence[Task], base: Mapping[str, Tensor], config: DamConfig) -> list[Finding]:
    """Scan a causal LM for texts that it knows by heart."""
    task = tasks[index]
    assert generates(task), "what classifies has no continuations"
    return scan_continuations(index, task, base, config)


register_scanner("classes", _classes)
register_scanner("continuations", _continuations)
