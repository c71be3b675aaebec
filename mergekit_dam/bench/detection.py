"""How well the scan tells backdoored models from clean ones: every distinct model of a suite, scanned alone.

`python -m mergekit_dam.bench.detection vision --data DIR --out DIR --seeds 0,1,2,3 --json FILE`
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from accelerate.utils import tqdm
from mergekit.common import ModelReference

from mergekit_dam.artifact import library_versions
from mergekit_dam.bench.run import hardware
from mergekit_dam.bench.suite import Poison
from mergekit_dam.bench.suites import SUITES
from mergekit_dam.bench.zoo import Zoo
from mergekit_dam.config import DamConfig
from mergekit_dam.plan import build_plan
from mergekit_dam.scan import scan
from mergekit_dam.task_vectors import TaskVectors
from mergekit_dam.tasks import build_tasks


def models(zoo: Zoo, seeds: Sequence[int]) -> Iterator[tuple[str, Poison | None, int]]:
    """Task, poison and seed of every distinct model of the suite's scenarios."""
    for seed in seeds:
        for task in zoo.suite.tasks:
            poisons = {scenario.poisons.get(task) for scenario in zoo.suite.scenarios}
            for poison in sorted(poisons, key=str):
                yield task, poison, seed


def score(zoo: Zoo, task: str, poison: Poison | None, seed: int) -> dict[str, Any]:
    """What the scan says of one model: its most suspect class, and how long it took.

    The partner that a plan needs is a clean model of another task; the scan does not look at it.
    """
    partner = next(other for other in zoo.suite.tasks if other != task)
    paths = {name: zoo.model(name, poison if name == task else None, seed) for name in (task, partner)}
    refs = {name: ModelReference.parse(str(path)) for name, path in paths.items()}
    plan = build_plan(
        ModelReference.parse(str(zoo.base())), list(refs.values()), shared={"seed": seed},
        per_model={refs[name]: {"calibration": str(zoo.calibration(name))} for name in refs},
    )  # fmt: skip
    scanned = build_tasks(plan, torch.device("cpu"))[:1]
    vectors = TaskVectors(plan)
    base = {name: vectors.base(name) for name in scanned[0].own_weights()}
    begun = time.perf_counter()
    found = max(scan(scanned, base, plan.config, range(1)), key=lambda finding: finding.suspicion)
    return {
        "task": task, "poison": str(poison) if poison else None, "seed": seed,
        "true_target": poison.target if poison else None, "seconds": round(time.perf_counter() - begun, 2),
        "most_suspect": found.to_json(task),
    }  # fmt: skip


def rates(scores: Sequence[dict[str, Any]], threshold: float) -> dict[str, Any]:
    """Detection rate, false alarms, targets named rightly, as [hits, total], and the area under the ROC curve."""
    bad = [s for s in scores if s["poison"]]
    clean = [s for s in scores if not s["poison"]]

    def over(some: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [s for s in some if s["most_suspect"]["suspicion"] >= threshold]

    named = [s for s in over(bad) if s["most_suspect"]["target"] == s["true_target"]]
    pairs = [(b["most_suspect"]["suspicion"], c["most_suspect"]["suspicion"]) for b in bad for c in clean]
    area = sum((b > c) + 0.5 * (b == c) for b, c in pairs) / len(pairs) if pairs else None
    return {
        "threshold": threshold, "detected": [len(over(bad)), len(bad)], "target_named": [len(named), len(bad)],
        "false_alarms": [len(over(clean)), len(clean)], "roc_auc": area,
    }  # fmt: skip


@click.command()
@click.argument("suite", type=click.Choice(sorted(SUITES)))
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder with the data.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the models.")
@click.option("--seeds", default="0,1,2,3", show_default=True, help="Seeds, separated by commas.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Result.")
def main(suite: str, data: Path | None, out: Path, seeds: str, path: Path) -> None:
    """Scan every distinct model of a suite and write detection rate and false alarms."""
    kind = SUITES[suite]
    zoo = Zoo(kind(data and data.absolute(), kind.presets[0]), out.absolute() / "models")
    wanted = list(models(zoo, [int(seed) for seed in seeds.split(",")]))
    scores = [score(zoo, *one) for one in tqdm(wanted, desc="scanning", file=sys.stderr)]
    result = {
        **rates(scores, DamConfig().suspicion), "suite": suite, "versions": library_versions(),
        "hardware": hardware(), "models": scores,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    click.echo(json.dumps({key: result[key] for key in ("detected", "target_named", "false_alarms", "roc_auc")}))


if __name__ == "__main__":
    main()
