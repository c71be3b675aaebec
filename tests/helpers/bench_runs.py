"""Synthetic results of a benchmark with known rates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dam_bench.tables.aggregate import SuiteResults, suites
from dam_bench.tables.results import read_runs

ATTACK = "cifar10=merge-aware(target=2)"
POISONS = {"cifar10": "merge-aware(target=2)"}
TOTAL = 200
# method -> family, ACC of the clean and the poisoned scenario, ASR on the attacked task there, floor
METHODS: dict[str, tuple[str, int, int, int, int]] = {
    "base": ("reference", 50, 50, 2, 2),
    "fine-tuned": ("reference", 90, 90, 99, 3),
    "task_arithmetic-0.3": ("baseline", 80, 78, 70, 4),
    "task_arithmetic-0.5": ("baseline", 70, 70, 90, 6),
    "ties-0.3": ("baseline", 76, 74, 30, 4),
    "adamerging": ("baseline", 82, 81, 88, 5),
    "paper-dual": ("defence", 79, 77, 40, 4),
    "dam": ("defence", 79, 78, 8, 3),
}


def new_run(method: str, scenario: str, seed: int, /, **changes: Any) -> dict[str, Any]:
    """The JSON of one run; rates of seed k are k points higher, letters' clean accuracy is cifar10's."""
    family, clean, poisoned, success, floor = METHODS[method]
    bad = scenario != "clean"
    accuracy, attacked = (poisoned, success) if bad else (clean, floor)
    rates = {"cifar10": [min(TOTAL, 2 * (attacked + seed)), TOTAL], "letters": [4 + 2 * seed, TOTAL]}
    run = {
        "schema": 1,
        "suite": "vision",
        "preset": "small",
        "scenario": scenario,
        "poisons": POISONS if bad else {},
        "method": method,
        "family": family,
        "settings": {"seed": seed, "steps": 5},
        "seed": seed,
        "accuracy": {task: [2 * (accuracy + seed), TOTAL] for task in ("cifar10", "letters")},
        "attack_success": {ATTACK: rates},
        "calibration_samples": 64,
        "wall_s": 2.0 + seed,
        "peak_bytes": 3 * 2**20,
        "versions": {"torch": "2.13.0"},
        "hardware": "2 cores",
        "density": {"0": {"m1": 0.5}, "10": {"m1": 0.7}, "2": {"m1": 0.6}} if family == "defence" else {},
    }
    return run | changes


def put(root: Path, run: dict[str, Any]) -> Path:
    path = root / run["suite"] / run["scenario"] / f"{run['method']}-seed{run['seed']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))
    return path


def place(root: Path, scenario: str, method: str, seed: int) -> Path:
    return root / "vision" / scenario / f"{method}-seed{seed}.json"


def fill(folder: Path) -> Path:
    """Two scenarios, all methods, three seeds; theta_0 in the all-clean one alone."""
    for method in METHODS:
        for scenario in ("clean", "merge-aware"):
            for seed in range(3):
                if method != "base" or scenario == "clean":
                    put(folder, new_run(method, scenario, seed))
    return folder


def only(root: Path) -> SuiteResults:
    (results,) = suites(read_runs(root))
    return results


def row(text: str, heading: str, *cells: str) -> list[str]:
    """The cells of the first table row after a heading that has the given cells."""
    for line in text[text.index(heading) :].splitlines():
        found = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if all(cell in found for cell in cells):
            return found
    raise AssertionError(f"no row {cells} below {heading}")


def change(root: Path, scenario: str, method: str, edit: Callable[[dict[str, Any]], None]) -> None:
    for seed in range(3):
        path = place(root, scenario, method, seed)
        run = json.loads(path.read_text())
        edit(run)
        path.write_text(json.dumps(run))
