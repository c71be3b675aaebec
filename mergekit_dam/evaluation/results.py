"""`dam/evaluation.json`: what was measured of a merge (`after`) and of its input models (`before`), as counts.

{"before" or "after": {"accuracy": {task: [hits, total]}, "attack_success": {attack: {task: [hits, total]}},
                       "datasets": {task: source}, "harness": {model: {task: see lm_harness.py}}}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mergekit_dam.errors import DamError, first_line
from mergekit_dam.io.files import report_lock, write_atomic
from mergekit_dam.io.untrusted import load_json, require_no_links_out

EVALUATION_FILE = "evaluation.json"
MERGE = "merge"  # the merge's name where models are told apart
When = Literal["before", "after"]


def read_measurements(folder: Path) -> dict[str, Any]:
    """The file's content; empty if there is none.

    Raises:
        DamError: a file that is no such JSON.
    """
    file = folder / EVALUATION_FILE
    if not file.is_file():
        return {}
    found = load_json(file, where=f"measurements {file}")
    try:
        for one in (found.get("before", {}), found.get("after", {})):
            _require_counts(one.get("accuracy", {}))
            for rates in one.get("attack_success", {}).values():
                _require_counts(rates)
            dict(one.get("datasets", {}))
    except (AttributeError, TypeError, ValueError) as error:
        raise DamError(
            f"measurements {file}",
            expected="JSON with before and after, and counts in them",
            got=first_line(error),
            cure="Remove the file and measure again.",
        ) from error
    return found


def _require_counts(rates: Mapping[str, Any]) -> None:
    """Raise ValueError, AttributeError or TypeError for anything but task -> [hits, total]."""
    for task, counts in rates.items():
        hits, total = counts
        if type(hits) is not int or type(total) is not int or not 0 <= hits <= total:
            raise ValueError(f"{counts!r} for {task}, which are no hits and total")


def add_measurement(folder: Path, when: When, measured: Mapping[str, Any]) -> None:
    """Merge counts into the file, task by task; a task measured again replaces its old counts. Parts may be missing."""
    require_no_links_out(folder, ("",))
    folder.mkdir(parents=True, exist_ok=True)
    with report_lock(folder):  # two runs at once would each lose the other's counts
        found = read_measurements(folder)
        kept: dict[str, Any] = found.setdefault(when, {})
        for key in ("accuracy", "datasets"):
            kept[key] = kept.get(key, {}) | dict(measured.get(key, {}))
        success = kept.setdefault("attack_success", {})
        for attack, rates in measured.get("attack_success", {}).items():
            success[attack] = success.get(attack, {}) | dict(rates)
        for model, tasks in measured.get("harness", {}).items():
            harness = kept.setdefault("harness", {})
            harness[model] = harness.get(model, {}) | dict(tasks)
        write_atomic(folder / EVALUATION_FILE, json.dumps(found, indent=1))


@dataclass(frozen=True)
class Rate:
    """A share with its counts."""

    hits: int
    total: int

    @property
    def percent(self) -> float:
        """100 x hits / total; NaN without samples."""
        return 100.0 * self.hits / self.total if self.total else float("nan")

    def __str__(self) -> str:
        return f"{self.percent:.1f} % ({self.hits}/{self.total})"


@dataclass(frozen=True)
class HarnessTask:
    """One task of an evaluation program.

    Attributes:
        metrics: name -> value and its standard error, where it has one.
        samples: how many; None for a group of tasks.
        by: the program and its version.
    """

    metrics: Mapping[str, tuple[float, float | None]]
    samples: int | None
    by: str


@dataclass(frozen=True)
class Measured:
    """Counts by task, and by attack and task.

    Attributes:
        accuracy: task -> clean accuracy.
        attack_success: attack -> task -> share of triggered inputs of other classes that get the target's.
        datasets: task -> what it was measured on, where known.
        source: the file that says so.
        harness: task -> what an evaluation program found.
    """

    accuracy: Mapping[str, Rate]
    attack_success: Mapping[str, Mapping[str, Rate]]
    datasets: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    harness: Mapping[str, HarnessTask] = field(default_factory=dict)


def read_measured(path: Path, *, required: bool) -> Measured | None:
    """Figures from a results file or a report.

    Args:
        path: JSON.
        required: whether a file without figures is a fault; a report may have none.

    Raises:
        DamError: not readable, no figures though required, or counts that cannot be.
    """

    def refuse(got: str) -> DamError:
        return DamError(
            f"results {path}",
            expected="JSON with counts: accuracy and attack_success",
            got=got,
            cure='E.g. {"accuracy": {"cars": [90, 100]}, "attack_success": {"patch": {"cars": [3, 90]}}}.',
        )

    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(first_line(error)) from error
    for key in ("evaluation", "after"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not any(
        isinstance(found.get(key), dict) and found[key] for key in ("accuracy", "attack_success", "harness")
    ):
        if required:
            raise refuse("none")
        return None
    try:
        return Measured(
            accuracy=_rates(found.get("accuracy") or {}),
            attack_success={str(name): _rates(rates) for name, rates in (found.get("attack_success") or {}).items()},
            datasets={str(k): str(v) for k, v in (found.get("datasets") or {}).items()},
            source=path.name,
            harness={
                str(task): _harness_task(one)
                for tasks in (found.get("harness") or {}).values()
                for task, one in tasks.items()
            },
        )
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise refuse(str(error)) from error


def _harness_task(one: Mapping[str, Any]) -> HarnessTask:
    metrics = {}
    for name, (value, error) in one["metrics"].items():
        metrics[str(name)] = (_finite(value), None if error is None else _finite(error))
    samples = one.get("samples")
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise ValueError(f"{samples!r} samples")
    return HarnessTask(metrics, samples, str(one.get("by", "an unnamed program")))


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no measured number")
    return float(value)


def _rates(found: Mapping[str, Any]) -> dict[str, Rate]:
    rates = {}
    for task, counts in found.items():
        hits, total = counts
        if isinstance(hits, bool) or not (isinstance(hits, int) and isinstance(total, int) and 0 <= hits <= total):
            raise ValueError(f"{counts!r} for {task}: not [hits, total]")
        if total > 0:  # a rate of no samples is no measurement
            rates[str(task)] = Rate(hits, total)
    return rates
