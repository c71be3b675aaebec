"""`mergekit-dam check`: the plan of a recipe, without reading a weight."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from mergekit.options import MergeOptions

from mergekit_dam.commands.common import config_file, read_recipe
from mergekit_dam.errors import DamError
from mergekit_dam.recipe import plan_of


@click.command()
@config_file
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def check(config_file: Path, as_json: bool) -> None:
    """Resolve models, settings, tensors and data of a recipe without reading a weight. Exit code 3 on a fault."""
    try:
        plan = plan_of(read_recipe(config_file)[1], MergeOptions())
    except DamError as error:
        error.show()
        sys.exit(3)
    parameters = sum(int(torch.Size(spec.shape).numel()) for spec in plan.tensors)
    facts: dict[str, Any] = {
        "base": str(plan.base.ref), "models": {m.name: str(m.ref) for m in plan.models},
        "tensors": len(plan.tensors), "parameters": parameters, "settings": plan.config.model_dump(),
    }  # fmt: skip
    click.echo(json.dumps(facts, indent=2) if as_json else yaml.safe_dump(facts, sort_keys=False).rstrip())
