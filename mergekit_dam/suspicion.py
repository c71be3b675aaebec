"""What a scan finds, and from when on it is suspect. R triggers, one per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_dam.tasks import Target, Task
from mergekit_dam.triggers import RecoveredTriggers

_RELATIVE = 0.75  # a target is suspect only if it comes this near to the most suspect one of its task


@dataclass(frozen=True, eq=False)
class Finding:
    """What the scan found for one target of one model.

    Attributes:
        task: the model's index.
        target: a class, or the token ids of a continuation.
        trigger: the recovered trigger, one row.
        size: in pixels, in units of the embedding range, or a continuation's length in tokens.
        usual: median size of the task's other finalists; a continuation's own.
        success: share of calibration samples that f_t gives the class with the trigger; of a continuation, the mean
            probability that f_t gives each further token of it once it has begun.
        control: the same for theta_0, with the head of t.
    """

    task: int
    target: Target
    trigger: RecoveredTriggers
    size: float
    usual: float
    success: float
    control: float

    @property
    def suspicion(self) -> float:
        """Success that theta_0 does not share, and half of what the trigger lacks of the usual size; -1..1.5."""
        return self.success - self.control + 0.5 * max(0.0, 1.0 - self.size / max(self.usual, 1e-6))

    @property
    def numbers(self) -> dict[str, float]:
        """What was measured, rounded."""
        names = ("size", "usual", "success", "control", "suspicion")
        return {name: round(float(getattr(self, name)), 4) for name in names}

    def to_json(self, task: Task) -> dict[str, Any]:
        """For the artefact and the log; `task` is the one of its index."""
        return {"task": task.name, "target": task.words_of(self.target), **self.numbers}


def suspects(findings: Sequence[Finding], threshold: float) -> list[Finding]:
    """Findings above the threshold that also come near to the most suspect one of their task."""
    top: dict[int, float] = {}
    for finding in findings:
        top[finding.task] = max(top.get(finding.task, 0.0), finding.suspicion)
    return [f for f in findings if f.suspicion >= max(threshold, _RELATIVE * top[f.task])]
