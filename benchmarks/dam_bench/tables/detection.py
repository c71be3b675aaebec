"""Compute how well the scan separates backdoored from clean models, from the findings in results of `dam`.

`python -m dam_bench.tables.detection benchmarks/results/vision benchmarks/study/seed3 --json FILE`
A model in several scenarios is scanned with the same seed each time, and counts once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dam_bench.suites.base import Scenario
from dam_bench.suites.registry import SUITES
from mergekit_dam.config import DamConfig
from mergekit_dam.errors import DamError

_NOTHING = {"target": None, "suspicion": 0.0}  # stands for a scan without findings


def read_scores(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read an entry per distinct model: task, poison, seed, the true target and the scan's most suspect target.

    Args:
        folders: folders of a suite's results, of which files of the method `dam` are read.

    Raises:
        DamError: no such file holds findings.
    """
    entries: dict[tuple[str, str | None, int], dict[str, Any]] = {}
    for path in sorted(path for folder in folders for path in folder.glob("*/dam-seed*.json")):
        run = json.loads(path.read_text("utf-8"))
        for task in run["accuracy"]:
            if "audit" not in run:
                continue
            poison, findings = run["poisons"].get(task), [f for f in run["audit"] if f.get("model", f["task"]) == task]
            target = None
            if poison:
                target = SUITES[run["suite"]].target_of(Scenario.parse(f"one: {task}={poison}").poisons[task])
            worst = max([*findings, _NOTHING], key=lambda finding: float(finding["suspicion"]))
            entries[task, poison, run["seed"]] = {
                "task": task,
                "poison": poison,
                "seed": run["seed"],
                "true_target": target,
                "most_suspect": worst,
            }
    if not entries:
        raise DamError(
            f"results {', '.join(map(str, folders))}",
            expected="SCENARIO/dam-seedN.json with the scan's findings",
            got="none",
            cure="Run `python -m dam_bench SUITE --method dam` first.",
        )
    return [entries[key] for key in sorted(entries, key=str)]


def rates(scores: Sequence[dict[str, Any]], threshold: float) -> dict[str, Any]:
    """Detection rate, false alarms and correctly named targets, as [hits, total], and the area under the ROC curve."""
    bad = [s for s in scores if s["poison"]]
    clean = [s for s in scores if not s["poison"]]

    def over(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [s for s in models if s["most_suspect"]["suspicion"] >= threshold]

    named = [s for s in over(bad) if s["most_suspect"]["target"] == s["true_target"]]
    pairs = [(b["most_suspect"]["suspicion"], c["most_suspect"]["suspicion"]) for b in bad for c in clean]
    area = sum((b > c) + 0.5 * (b == c) for b, c in pairs) / len(pairs) if pairs else None
    return {
        "threshold": threshold,
        "detected": [len(over(bad)), len(bad)],
        "target_named": [len(named), len(bad)],
        "false_alarms": [len(over(clean)), len(clean)],
        "roc_auc": area,
    }


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Result.")
def main(folders: tuple[Path, ...], path: Path) -> None:
    """Write detection rate and false alarms of the scan, with every model's score."""
    scores = read_scores(folders)
    result = {**rates(scores, DamConfig().suspicion), "models": scores}
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    click.echo(json.dumps({key: value for key, value in result.items() if key != "models"}))


if __name__ == "__main__":
    main()
