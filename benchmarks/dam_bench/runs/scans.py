"""Scan clean models and victims of suite `vision` on bases that differ, each beside its clean twin.

`python -m dam_bench.runs.scans --data DIR --out OUT --base shallow --seeds 0,1`. Finished models are not repeated. The
table of all files: `python -m dam_bench.runs.scans --table OUT`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.common import ModelReference

from dam_bench.runs.run import hardware
from dam_bench.suites.base import Poison, Scenario
from dam_bench.suites.vision import PRESETS, VisionSuite
from dam_bench.victims.model_store import ModelStore
from dam_bench.victims.training import Schedule
from mergekit_dam.config import DamConfig
from mergekit_dam.engine.device import CPU
from mergekit_dam.engine.task_vectors import TaskVectors
from mergekit_dam.evaluation.metrics import accuracy, attack_success_rate
from mergekit_dam.evaluation.results import Rate
from mergekit_dam.io.cache import library_versions
from mergekit_dam.models.plan import build_plan
from mergekit_dam.scan.audit import merge_settings
from mergekit_dam.scan.scanner import scan
from mergekit_dam.scan.twin import compared_with_twins
from mergekit_dam.tasks import build_tasks

_SMALL = PRESETS["small"]
_SHALLOW = replace(
    _SMALL,
    hidden_size=64,
    num_layers=2,
    pretraining=Schedule(1500, batch_size=16, learning_rate=1e-3, weight_decay=0.05),
    fine_tuning=Schedule(300, batch_size=64, learning_rate=1e-4),
    poisoning=Schedule(400, batch_size=64, learning_rate=2e-4),
)
BASES = {
    "small": _SMALL,
    "shallow": _SHALLOW,
    "brief": replace(_SHALLOW, pretraining=replace(_SHALLOW.pretraining, steps=400)),
    "tuned": replace(
        _SHALLOW,
        fine_tuning=replace(_SHALLOW.fine_tuning, learning_rate=3e-4),
        poisoning=replace(_SHALLOW.poisoning, learning_rate=3e-4),
    ),
    "deep": replace(
        _SHALLOW,
        num_layers=4,
        pretraining=replace(_SHALLOW.pretraining, steps=1000),
        fine_tuning=replace(_SHALLOW.fine_tuning, learning_rate=5e-5),
        poisoning=replace(_SHALLOW.poisoning, learning_rate=1e-4),
    ),
}
# kind x rate; a clean model of each task beside them
VICTIMS = (
    "digits=patch(target=1,rate=1)",
    "letters=patch(target=0,rate=0.1,size=4)",
    "stripes=patch(target=2,rate=0.3)",
    "letters=blended(target=2,rate=1)",
    "shapes=wanet(target=1,rate=1)",
    "cifar10=merge-aware(target=3,rate=0.5,size=6)",
    "cifar10=adaptive(target=3,rate=0.5,size=6)",
    "shapes=natural(target=1,rate=1)",
)


class VariedBases(VisionSuite):
    """Suite `vision` on one of `BASES`."""

    sizes_by_preset = BASES
    presets = tuple(BASES)


def scanned(store: ModelStore, task: str, poison: Poison | None, seed: int) -> dict[str, Any]:
    """Scan a model of the suite alone, and its clean twin whatever its score; return findings and measurements.

    Args:
        store: the suite's models.
        task: of the model.
        poison: of a victim.
        seed: of the model, and of the scan.
    """
    suite, base, path = store.suite, store.base(), store.model(task, poison, seed)
    other = next(one for one in suite.tasks if one != task)  # a plan has two models; the second is not scanned
    folders = {task: path, other: store.model(other, None, seed)}
    refs = {name: ModelReference.parse(str(folder)) for name, folder in folders.items()}
    plan = build_plan(
        ModelReference.parse(str(base)),
        list(refs.values()),
        shared={**suite.shared_parameters(base), "seed": seed},
        per_model={
            ref: {"calibration": str(store.calibration(name)), **suite.model_parameters(folders[name])}
            for name, ref in refs.items()
        },
    )
    first, *_ = build_tasks(plan, CPU)
    theta = {spec.name: TaskVectors(plan).base(spec.name) for spec in plan.tensors}
    config = merge_settings(plan.config)
    findings = compared_with_twins(scan([first], theta, config, [0]), [first], theta, config, threshold=-1.0)
    model, data = suite.load_model(path), suite.split(task).evaluation
    result: dict[str, Any] = {"accuracy": _counts(accuracy(model, data))}
    if poison is not None:
        rate = attack_success_rate(model, data, store.trigger(task, poison, seed), poison.target)
        result |= {"target": poison.target, "attack_success": _counts(rate)}
    return {
        "base": suite.preset,
        "task": task,
        "poison": None if poison is None else str(poison),
        "seed": seed,
        **result,
        "findings": [finding.to_json([first]) | {"shared": finding.shared} for finding in findings],
        "versions": library_versions(),
        "hardware": hardware(),
    }


def table(results: Iterable[Mapping[str, Any]], threshold: float) -> str:
    """Markdown: per base and attack, how many models are over the threshold, without and with their twins."""
    rows: dict[tuple[str, str], list[list[bool]]] = {}
    for one in results:
        findings = one["findings"]
        attack = "clean" if one["poison"] is None else one["poison"].partition("(")[0]
        scores = [max(f["suspicion"] + share * f["shared"] for f in findings) for share in (1, 0)]
        rows.setdefault((one["base"], attack), []).append([score >= threshold for score in scores])
    lines = ["| base | models | over the threshold | with the twin |", "| --- | --- | --- | --- |"]
    for (base, attack), over in sorted(rows.items()):
        alone, compared = (Rate(sum(each), len(each)) for each in zip(*over, strict=True))
        lines.append(f"| {base} | {attack} | {alone.hits} of {alone.total} | {compared.hits} of {compared.total} |")
    return "\n".join(lines)


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder with the data.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Models and results.")
@click.option("--base", type=click.Choice(list(BASES)), default="shallow", show_default=True)
@click.option("--seeds", default="0", show_default=True, help="Seeds, separated by commas.")
@click.option("--clean/--victims", default=None, help="Only these models.")
@click.option(
    "--table", "shown", type=click.Path(exists=True, path_type=Path), help="Print the table of these results."
)
def main(data: Path | None, out: Path | None, base: str, seeds: str, clean: bool | None, shown: Path | None) -> None:
    """Scan all models of a base, one JSON each."""
    if shown is not None:
        found = [json.loads(path.read_text("utf-8")) for path in sorted(shown.rglob("*.json"))]
        click.echo(table(found, DamConfig().suspicion))
        return
    if out is None:
        raise click.UsageError("--out is needed to scan")
    torch.set_num_threads(1)
    suite = VariedBases(data, base)
    store = ModelStore(suite, out / "models")
    victims = [poison for text in VICTIMS for poison in Scenario.parse(f"one: {text}").poisons.items()]
    models = [(task, None) for task in suite.tasks if clean is not False] + (victims if clean is not True else [])
    for seed in map(int, seeds.split(",")):
        for task, poison in models:
            name = f"{task}-{'clean' if poison is None else poison}-seed{seed}.json"
            path = out / "scans" / base / name
            if not path.is_file():
                result = scanned(store, task, poison, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", "utf-8")
            click.echo(path)


def _counts(rate: Rate) -> list[int]:
    return [rate.hits, rate.total]


if __name__ == "__main__":
    main()
