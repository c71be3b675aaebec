"""Vaccinate single models and measure their backdoors before and after: `python -m dam_bench.runs.vaccine SUITE`.

The control of a run has `--set plant=false`: as many steps, and nothing planted. Finished runs are not repeated. The
table of all runs: `python -m dam_bench.runs.vaccine --table OUT`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
import transformers
import yaml

from dam_bench.runs.run import general_ability, hardware
from dam_bench.suites.base import Poison, Scenario, Suite
from dam_bench.suites.registry import SUITES
from dam_bench.victims.cleaned import clean_model
from dam_bench.victims.model_store import ModelStore
from mergekit_dam.evaluation.metrics import Attack, evaluate_merge
from mergekit_dam.io.cache import library_versions
from mergekit_dam.io.calibration import digest

SCHEMA = 1
_COLUMNS = (
    "model",
    "seed",
    "settings",
    "ACC",
    "ASR",
    "without trigger",
    "cleaned: ACC",
    "ASR",
    "without trigger",
    "held out: planted",
    "left",
    "unlearned: left",
    "agreement",
    "s",
)


def run(
    store: ModelStore,
    task: str,
    poison: Poison | None,
    seed: int,
    settings: Mapping[str, Any],
    asked: Poison | None = None,
) -> dict[str, Any]:
    """Vaccinate a model of a suite, and measure it before and after.

    Args:
        store: the suite's models.
        task: task of the model.
        poison: the model's backdoor; None for a clean model.
        seed: of the model and of the vaccination.
        settings: of the vaccination.
        asked: the attack to measure; None: the model's own.

    Returns:
        JSON: counts `before` and `after`, as `evaluate_merge` gives them, and the facts of vaccine.json.
    """
    suite, model, asked = store.suite, store.model(task, poison, seed), asked or poison
    attacks = [] if asked is None else store.attacks("attack", task, asked, seed)
    with tempfile.TemporaryDirectory() as folder:
        cleaned = clean_model(store, task, poison, seed, settings, Path(folder) / task)
        measured = {when: _measured(suite, task, path, attacks) for when, path in _models(model, cleaned.folder)}
    facts = {k: v for k, v in cleaned.facts.items() if k not in ("calibration", "created", "versions", "name")}
    return {
        "schema": SCHEMA,
        "suite": suite.name,
        "preset": suite.preset,
        "task": task,
        "seed": seed,
        "poison": None if poison is None else str(poison),
        "attack": None if asked is None else str(asked),
        "settings": dict(settings),
        **measured,
        "vaccine": facts,
        "versions": library_versions(),
        "hardware": hardware(),
    }


def _models(before: Path, after: Path) -> Iterable[tuple[str, Path]]:
    return ("before", before), ("after", after)


def _measured(suite: Suite, task: str, path: Path, attacks: list[Attack]) -> dict[str, Any]:
    split = suite.split(task)
    seen = {digest(sample) for sample in split.calibration}
    models = {task: suite.load_model(path)}
    scores = evaluate_merge(models, {task: split.evaluation}, attacks, calibration=seen).to_json()
    return scores | general_ability(suite, models, whole=False)


def result_file(
    out: Path,
    suite: Suite,
    task: str,
    poison: Poison | None,
    seed: int,
    settings: Mapping[str, Any],
    asked: Poison | None = None,
) -> Path:
    """Path of a run's JSON."""
    attack = "clean" if poison is None else str(poison)
    asked_too = f"-asked-{asked}" if asked is not None else ""
    how = ",".join(f"{k}={v}" for k, v in sorted(settings.items())) or "default"
    name = re.sub(r"[^\w=,.+-]+", "_", f"{task}={attack}{asked_too}-{how}-seed{seed}.json")
    return out / suite.name / name


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """Write a Markdown table with a row per run, in percent."""
    rows = []
    for result in results:
        vaccine, before, after = result["vaccine"], result["before"], result["after"]
        held, agreement = vaccine["held_out"], vaccine["agreement"]
        rows.append(
            [
                f"{result['task']}={result['poison'] or 'clean'}",
                result["seed"],
                ", ".join(f"{k}={v}" for k, v in result["settings"].items()) or "default",
                *_rates(before),
                *_rates(after),
                _percent(held["planted"]),
                _percent(held["unlearned"]),
                _percent(vaccine["unlearned"]["unlearned"]),
                _percent(agreement["after"]),
                round(vaccine["seconds"]),
            ]
        )
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + " --- |" * len(_COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _rates(measured: Mapping[str, Any]) -> list[str]:
    def rate(counts: Mapping[str, Any]) -> str:
        return next((f"{100 * hits / total:.1f}" for hits, total in counts.values()), "-")

    attacks = [measured[key].get("attack", {}) for key in ("attack_success", "without_trigger")]
    return [rate(measured["accuracy"]), *map(rate, attacks)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


@click.command()
@click.argument("suite", required=False)
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder with the data.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Models; results go to OUT/vaccine.")
@click.option("--preset", help="Size of models and data; default: the suite's first preset.")
@click.option("--model", "models", multiple=True, help="'task=attack(option=value,...)', or 'task' for a clean model.")
@click.option("--asked", help="Measure this attack, e.g. on a clean model: its floor.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds, separated by commas.")
@click.option("--set", "sets", multiple=True, help="A setting of the vaccination, name=value.")
@click.option(
    "--table", "shown", type=click.Path(exists=True, path_type=Path), help="Print the table of these results."
)
def main(
    suite: str | None,
    data: Path | None,
    out: Path | None,
    preset: str | None,
    models: tuple[str, ...],
    asked: str | None,
    seeds: str,
    sets: tuple[str, ...],
    shown: Path | None,
) -> None:
    """Vaccinate single models of a suite, and measure the remaining backdoors."""
    if shown is not None:
        click.echo(table(json.loads(file.read_text("utf-8")) for file in sorted(shown.rglob("*.json"))))
        return
    if suite not in SUITES or out is None or not models:
        raise click.UsageError(f"Give a suite ({', '.join(SUITES)}), --out and --model, or --table.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    built = SUITES[suite](data, preset or SUITES[suite].presets[0])
    store = ModelStore(built, out / "models")
    settings = {key: yaml.safe_load(value) for key, _, value in (assignment.partition("=") for assignment in sets)}
    measured = None if asked is None else next(iter(Scenario.parse(f"asked: {asked}").poisons.values()))
    for seed in map(int, seeds.split(",")):
        for text in models:
            task, _, attack = text.partition("=")
            poison = Scenario.parse(f"one: {text}").poisons[task] if attack else None
            file = result_file(out / "vaccine", built, task, poison, seed, settings, measured)
            if not file.is_file():
                result = run(store, task, poison, seed, settings, measured)
                file.parent.mkdir(parents=True, exist_ok=True)
                temporary = file.with_suffix(".tmp")
                temporary.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", "utf-8")
                temporary.replace(file)
            click.echo(file)


if __name__ == "__main__":
    main()
