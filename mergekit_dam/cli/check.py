"""`mergekit-dam check`: the plan of a recipe, without reading a weight."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import click
import yaml
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dam.cli.common import FINDING, config_file, hush, json_option, say, seed_option
from mergekit_dam.engine.device import device_of
from mergekit_dam.errors import DamError
from mergekit_dam.learn.estimate import estimate, measured_speed
from mergekit_dam.models.plan import Plan
from mergekit_dam.recipe import planned
from mergekit_dam.tasks.preflight import preflight


@click.command(cls=PrettyPrintHelp)
@config_file
@seed_option
@json_option
@add_merge_options
def check(merge_options: MergeOptions, config_file: Path, seed: int | None, as_json: bool) -> None:
    """Resolve models, settings, tensors and data of a recipe without reading a weight.

    Of models on the Hub only configs, tokenizers and the headers of the weight files are fetched.
    Prints what would be merged, on which data, and about how much memory and time learning takes. The first fault
    is printed with its cure; the exit code is then 3.
    """
    hush(merge_options.quiet)
    try:
        show_plan(config_file, options=merge_options, seed=seed, as_json=as_json)
    except DamError as error:
        error.show()
        sys.exit(FINDING)


def show_plan(config_file: Path, *, options: MergeOptions, seed: int | None, as_json: bool) -> None:
    """Print the plan on stdout and warnings on stderr: `check`, and every `--dry-run` of a recipe.

    Raises:
        DamError: the first fault in recipe, models, data, heads, preprocessing or tokenizers.
    """
    with planned(config_file, options=options, seed=seed) as plan:
        facts, warnings = describe_plan(plan)
    for warning in warnings:
        say(f"warning: {warning}", quiet=options.quiet)
    click.echo(json.dumps(facts, indent=2) if as_json else yaml.safe_dump(facts, sort_keys=False).rstrip())


def describe_plan(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """The plan as JSON, and warnings."""
    models, warnings = preflight(plan)
    device = device_of(plan.config.device)
    guess = estimate(plan, flops_per_second=measured_speed(device))
    assert guess.seconds is not None, "the speed is known"
    size = 2**20
    return {
        "base": str(plan.base.ref), "models": models, "tensors": len(plan.tensors),
        "parameters": sum(math.prod(spec.shape) for spec in plan.tensors),
        "estimate": {
            "device": str(device),
            "memory MiB": {part: round(amount / size, 1) for part, amount in guess.memory_bytes.items()},
            "memory MiB in all": round(sum(guess.memory_bytes.values()) / size, 1),
            "seconds": [float(f"{bound:.2g}") for bound in guess.seconds],
        },
        "settings": plan.config.model_dump(),
    }, warnings  # fmt: skip
