"""`mergekit-dam`: mergekit's own commands with checks before and after, and a look at the installation."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dam.config import ModelSettings
from mergekit_dam.errors import DamError
from mergekit_dam.method import register_dam
from mergekit_dam.plan import model_input
from mergekit_dam.recipe import plan_of
from mergekit_dam.untrusted import load_yaml


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("mergekit-dam"))
def main() -> None:
    """Defense-Aware Merging for mergekit."""
    register_dam()


@main.command(cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out_path", type=click.Path(file_okay=False, path_type=Path))
@add_merge_options
def merge(merge_options: MergeOptions, config_file: Path, out_path: Path) -> None:
    """Merge as mergekit-yaml does (any method), strict about settings, and compare the output with the base."""
    from mergekit.common import dtype_from_name

    from mergekit_dam.verify import verify_output

    merge_options.apply_global_options()
    source, config = _read(config_file)
    if config.merge_method == "dam":
        plan_of(config, merge_options)
    run_merge(config, str(out_path), merge_options, config_source=source)
    if config.base_model is not None:
        base = model_input("base", config.base_model, ModelSettings(), merge_options)
        dtype = dtype_from_name(config.out_dtype or config.dtype)
        verify_output(out_path, base.path, dtype=dtype, base_config=base.config)


@main.command()
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def check(config_file: Path, as_json: bool) -> None:
    """Resolve models, settings and tensors of a dam recipe without reading a weight. Exit code 3 on a fault."""
    try:
        plan = plan_of(_read(config_file)[1], MergeOptions())
    except DamError as error:
        error.show()
        sys.exit(3)
    parameters = sum(int(torch.Size(spec.shape).numel()) for spec in plan.tensors)
    facts: dict[str, Any] = {
        "base": str(plan.base.ref), "models": {m.name: str(m.ref) for m in plan.models},
        "tensors": len(plan.tensors), "parameters": parameters, "settings": plan.config.model_dump(),
    }  # fmt: skip
    click.echo(json.dumps(facts, indent=2) if as_json else yaml.safe_dump(facts, sort_keys=False).rstrip())


@main.command()
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
def bench(
    suite: str, data: Path | None, out: Path, preset: str | None, seeds: str, methods: tuple[str, ...],
    scenarios: tuple[str, ...], add: tuple[str, ...], workers: int, threads: int, gates: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Run a suite of the benchmark: build models, attack, merge, defend, measure. Goes on where it stopped."""
    from mergekit_dam.bench.command import Options
    from mergekit_dam.bench.command import bench as run
    from mergekit_dam.bench.suite import Scenario

    options = Options(
        suite=suite, preset=preset, data=data and data.absolute(), out=out.absolute(), seeds=_numbers(seeds),
        methods=methods, scenarios=scenarios, extra=tuple(Scenario.parse(text) for text in add), workers=workers,
        threads=threads, gates=gates, dry_run=dry_run,
    )  # fmt: skip
    run(options, lambda text: click.echo(text, err=True))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise DamError(
            "--seeds", expected="whole numbers separated by commas", got=repr(text), cure="E.g. 0,1,2."
        ) from (error)


@main.command()
def doctor() -> None:
    """Versions, the state of the autoload hook, and devices, as JSON."""
    from mergekit.merge_methods import registered_methods

    from mergekit_dam.artifact import library_versions

    click.echo(json.dumps({
        "versions": library_versions(),
        "autoload": {
            "MERGEKIT_DAM_AUTOLOAD": os.environ.get("MERGEKIT_DAM_AUTOLOAD", "1"),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1"),
            "hook loaded": "_mergekit_dam_autoload" in sys.modules,
        },
        "dam registered": "dam" in {method.spec.name for method in registered_methods()},
        "accelerators": torch.accelerator.device_count() if torch.accelerator.is_available() else 0,
    }, indent=2))  # fmt: skip


def _read(path: Path) -> tuple[str, MergeConfiguration]:
    source = path.read_text("utf-8")
    try:
        return source, MergeConfiguration.model_validate(load_yaml(source, f"recipe {path}"))
    except (ValueError, RuntimeError, TypeError, RecursionError) as error:
        if isinstance(error, DamError):
            raise
        raise DamError(
            f"recipe {path}", expected="a mergekit configuration", got=" ".join(str(error).split())[:200],
            cure="See the example in the README.",
        ) from error  # fmt: skip
