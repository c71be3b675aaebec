"""`dam/evaluation.json`: what was measured of a merge (`after`) and of its input models (`before`), as counts.

{"before" or "after": {"accuracy": {task: [hits, total]}, "attack_success": {attack: {task: [hits, total]}},
                       "datasets": {task: source}, "harness": {model: {task: see lm_harness.py}}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mergekit_dam.errors import DamError, first_line
from mergekit_dam.io.files import write_whole, writing_facts
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
            f"measurements {file}", expected="JSON with before and after, and counts in them", got=first_line(error),
            cure="Remove the file and measure again.",
        ) from error  # fmt: skip
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
    with writing_facts(folder):  # two runs at once would each lose the other's counts
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
        write_whole(folder / EVALUATION_FILE, json.dumps(found, indent=1))
