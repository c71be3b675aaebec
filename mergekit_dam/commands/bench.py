"""`mergekit-dam bench`: options of the benchmark."""

from __future__ import annotations

import os
from pathlib import Path

import click

from mergekit_dam.bench.command import Options
from mergekit_dam.bench.command import bench as run
from mergekit_dam.bench.suite import Scenario
from mergekit_dam.commands.common import quiet_option, say
from mergekit_dam.errors import DamError


@click.command()
@click.argument("suite")
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder with the data.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Models and results.")
@click.option("--preset", help="Size of models and data; the first one of the suite if not given.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds, separated by commas.")
@click.option("--method", "methods", multiple=True, help="Only this method (may be repeated).")
@click.option("--scenario", "scenarios", multiple=True, help="Only this scenario (may be repeated).")
@click.option("--add", multiple=True, help="A scenario of your own: 'name: task=attack(option=value,...) ...'.")
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count(), help="Runs at a time; default: all cores.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of each run.")
@click.option("--gates/--no-gates", default=True, help="Stop when a gate fails (default), or go on.")
@click.option("--dry-run", is_flag=True, help="Say what there is to do and how long it takes.")
@quiet_option
def bench(
    suite: str, data: Path | None, out: Path, preset: str | None, seeds: str, methods: tuple[str, ...],
    scenarios: tuple[str, ...], add: tuple[str, ...], workers: int, threads: int, gates: bool, dry_run: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Run a suite of the benchmark: build models, attack, merge, defend, measure. Goes on where it stopped."""
    options = Options(
        suite=suite, preset=preset, data=data and data.absolute(), out=out.absolute(), seeds=_numbers(seeds),
        methods=methods, scenarios=scenarios, extra=tuple(Scenario.parse(text) for text in add), workers=workers,
        threads=threads, gates=gates, dry_run=dry_run,
    )  # fmt: skip
    run(options, lambda text: say(text, quiet=quiet))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise DamError(
            "--seeds", expected="whole numbers separated by commas", got=repr(text), cure="E.g. 0,1,2."
        ) from error
