"""`dam/evaluation.json`: what was measured of a merge (`after`) and of its input models (`before`), as counts.

{"before" or "after": {"accuracy": {task: [hits, total]}, "attack_success": {attack: {task: [hits, total]}},
                       "datasets": {task: source}, "harness": {model: {task: see harness.py}}}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mergekit_dam.errors import DamError

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
    try:
        found = json.loads(file.read_text("utf-8"))
        if not isinstance(found, dict) or not all(isinstance(found.get(k, {}), dict) for k in ("before", "after")):
            raise ValueError("not an object with before and after")
    except (OSError, ValueError) as error:
        raise DamError(
            f"measurements {file}", expected="JSON with before and after", got=str(error),
            cure="Remove the file and measure again.",
        ) from error  # fmt: skip
    return found


def add_measurement(folder: Path, when: When, measured: Mapping[str, Any]) -> None:
    """Merge counts into the file, task by task; a task measured again replaces its old counts. Parts may be missing."""
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
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{EVALUATION_FILE}.part"
    part.write_text(json.dumps(found, indent=1), encoding="utf-8")
    os.replace(part, folder / EVALUATION_FILE)
