"""Read and write `dam/evaluation.json`: counts measured on a merge (`after`) and on its input models (`before`).

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

from mergekit_dam.artifact.folder import EVALUATION_FILE
from mergekit_dam.errors import DamError, first_line
from mergekit_dam.io.files import report_lock, write_atomic
from mergekit_dam.io.untrusted import load_json, require_no_links_out

MERGE = "merge"  # the merge's name in results by model
When = Literal["before", "after"]


def read_measurements(folder: Path) -> dict[str, Any]:
    """Read `evaluation.json` of a folder; empty if the file is missing.

    Raises:
        DamError: the file has another form.
    """
    file = folder / EVALUATION_FILE
    if not file.is_file():
        return {}
    values = load_json(file, where=f"measurements {file}")
    try:
        for part in (values.get("before", {}), values.get("after", {})):
            for rates in (part.get("accuracy", {}), *part.get("attack_success", {}).values()):
                for task, counts in rates.items():
                    _rate_of(task, counts)
            dict(part.get("datasets", {}))
    except (AttributeError, TypeError, ValueError) as error:
        raise DamError(
            f"measurements {file}",
            expected="JSON with before and after, and counts in them",
            got=first_line(error),
            cure="Remove the file and measure again.",
        ) from error
    return values


def add_measurement(folder: Path, when: When, measured: Mapping[str, Any]) -> None:
    """Merge counts into `evaluation.json`, task by task; new counts of a task replace its old ones."""
    require_no_links_out(folder, ("",))
    folder.mkdir(parents=True, exist_ok=True)
    with report_lock(folder):  # two runs at the same time would overwrite each other's counts
        measurements = read_measurements(folder)
        kept: dict[str, Any] = measurements.setdefault(when, {})
        for key in ("accuracy", "datasets"):
            kept[key] = kept.get(key, {}) | dict(measured.get(key, {}))
        success = kept.setdefault("attack_success", {})
        for attack, rates in measured.get("attack_success", {}).items():
            success[attack] = success.get(attack, {}) | dict(rates)
        for model, tasks in measured.get("harness", {}).items():
            harness = kept.setdefault("harness", {})
            harness[model] = harness.get(model, {}) | dict(tasks)
        write_atomic(folder / EVALUATION_FILE, json.dumps(measurements, indent=1))


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
    """Results of one task of an evaluation program.

    Attributes:
        metrics: name -> value and standard error, or None without one.
        samples: number of samples; None for a group of tasks.
        by: the program and its version.
    """

    metrics: Mapping[str, tuple[float, float | None]]
    samples: int | None
    by: str


@dataclass(frozen=True)
class Results:
    """Results by task, and by attack and task.

    Attributes:
        accuracy: task -> clean accuracy.
        attack_success: attack -> task -> share of triggered inputs of other classes that get the target class.
        datasets: task -> evaluation data, where known.
        source: name of the file with these results.
        harness: task -> results of an evaluation program.
    """

    accuracy: Mapping[str, Rate]
    attack_success: Mapping[str, Mapping[str, Rate]]
    datasets: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    harness: Mapping[str, HarnessTask] = field(default_factory=dict)


def read_results(path: Path, *, required: bool) -> Results | None:
    """Read results from a results file or a report.

    Args:
        path: a JSON file.
        required: whether a file without results is an error; a report may have none.

    Raises:
        DamError: the file is not readable, has no results though required, or has impossible counts.
    """

    def refuse(got: str) -> DamError:
        return DamError(
            f"results {path}",
            expected="JSON with counts: accuracy and attack_success",
            got=got,
            cure='E.g. {"accuracy": {"cars": [90, 100]}, "attack_success": {"patch": {"cars": [3, 90]}}}.',
        )

    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(first_line(error)) from error
    for key in ("evaluation", "after"):
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    if not isinstance(values, dict) or not any(
        isinstance(values.get(key), dict) and values[key] for key in ("accuracy", "attack_success", "harness")
    ):
        if required:
            raise refuse("none")
        return None
    try:
        return Results(
            accuracy=_parse_rates(values.get("accuracy") or {}),
            attack_success={str(name): _parse_rates(r) for name, r in (values.get("attack_success") or {}).items()},
            datasets={str(k): str(v) for k, v in (values.get("datasets") or {}).items()},
            source=path.name,
            harness={
                str(task): _parse_harness_task(result)
                for tasks in (values.get("harness") or {}).values()
                for task, result in tasks.items()
            },
        )
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise refuse(str(error)) from error


def _parse_harness_task(result: Mapping[str, Any]) -> HarnessTask:
    metrics = {}
    for name, (value, error) in result["metrics"].items():
        metrics[str(name)] = (_finite(value), None if error is None else _finite(error))
    samples = result.get("samples")
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise ValueError(f"{samples!r} samples")
    return HarnessTask(metrics, samples, str(result.get("by", "an unnamed program")))


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no measured number")
    return float(value)


def _parse_rates(values: Mapping[str, Any]) -> dict[str, Rate]:
    """Parse task -> [hits, total]; a rate of no samples is no measurement, and is left out."""
    rates = {str(task): _rate_of(task, counts) for task, counts in values.items()}
    return {task: rate for task, rate in rates.items() if rate.total > 0}


def _rate_of(task: str, counts: Any) -> Rate:
    """Parse [hits, total]; raise ValueError or TypeError for anything else."""
    hits, total = counts
    if type(hits) is not int or type(total) is not int or not 0 <= hits <= total:
        raise ValueError(f"{counts!r} for {task}: not [hits, total]")
    return Rate(hits, total)
