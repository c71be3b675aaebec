"""The scan's findings as snapshots hold them, and as processes tell each other of them: JSON, and triggers apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_dam.learn.trigger_pool import blank
from mergekit_dam.scan.findings import Finding
from mergekit_dam.tasks import Target, Task

_NUMBERS = ("task", "target", "size", "usual", "success", "control", "carrier")


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
