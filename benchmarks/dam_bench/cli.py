"""Define the command line of `python -m dam_bench`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dam_bench.runs.command import Options, Outcome
from dam_bench.runs.command import bench as run
from dam_bench.suites.base import Scenario
from mergekit_dam.cli.common import json_option, message, quiet_option
from mergekit_dam.errors import DamError


@click.command()
@click.argument("suite")
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder with the data.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Models and results.")
@click.option("--preset", help="Size of models and data; default: the suite's first preset.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds, separated by commas.")
@click.option("--method", "methods", multiple=True, help="Only this method (may be repeated).")
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    help="Only this scenario (may be repeated); some run only by name.",
)
@click.option("--add", multiple=True, help="A scenario of your own: 'name: task=attack(option=value,...) ...'.")
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count(), help="Runs at a time; default: all cores.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of each run.")
@click.option(
    "--gates/--no-gates", default=True, help="First run the methods that the gates need, and stop when a gate fails."
)
@click.option("--dry-run", is_flag=True, help="Print the number of models and runs to make, and the time they take.")
@json_option
@quiet_option
def bench(
    suite: str,
    data: Path | None,
    out: Path,
    preset: str | None,
    seeds: str,
    methods: tuple[str, ...],
    scenarios: tuple[str, ...],
    add: tuple[str, ...],
    workers: int,
    threads: int,
    gates: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run a suite of the benchmark: build models, attack, merge, defend, measure. It resumes where it stopped.

    Prints the result files, one per line; as JSON also the numbers of models and runs to make, and the checked gates.
    """
    options = Options(
        suite=suite,
        preset=preset,
        data=data and data.absolute(),
        out=out.absolute(),
        seeds=_numbers(seeds),
        methods=methods,
        scenarios=scenarios,
        extra=tuple(Scenario.parse(text) for text in add),
        workers=workers,
        threads=threads,
        gates=gates,
        dry_run=dry_run,
    )
    outcome = run(options, lambda text: message(text, quiet=quiet))
    if as_json:
        click.echo(json.dumps(_facts(outcome), indent=2))
    else:
        for file in outcome.results:
            click.echo(file)


def _facts(outcome: Outcome) -> dict[str, Any]:
    to_do = outcome.to_do
    return {
        "suite": to_do.suite,
        "preset": to_do.preset,
        "models": to_do.models[0],
        "models_to_build": to_do.models[1],
        "runs": to_do.runs[0],
        "runs_to_do": to_do.runs[1],
        "minutes": round(to_do.minutes, 1),
        "results": [str(file) for file in outcome.results],
        "gates": [asdict(gate) for gate in outcome.gates],
    }


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise DamError(
            "--seeds", expected="whole numbers separated by commas", got=repr(text), cure="E.g. 0,1,2."
        ) from error
