"""What several commands share: arguments, options, exit codes, and how a recipe is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_dam.errors import DamError
from mergekit_dam.method import register_dam
from mergekit_dam.plan import Plan
from mergekit_dam.recipe import plan_of

# 0 success, 1 a fault (DamError), 2 a wrong command line (click)
FINDING = 3  # `check`: the recipe cannot be merged; `audit`: a model is over the threshold

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
existing_folder = click.Path(exists=True, file_okay=False, path_type=Path)
config_file: Decorator = click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
quiet_option: Decorator = click.option(
    "--quiet", is_flag=True, help="Suppress progress bars and other non-essential output"
)
seed_option: Decorator = click.option("--seed", type=click.IntRange(0), help="Use this seed, not the recipe's.")


def say(text: str, *, quiet: bool = False) -> None:
    """A message for a person: on stderr, so that stdout holds the result alone."""
    if not quiet:
        click.echo(text, err=True)


def read_recipe(path: Path, **settings: Any) -> tuple[str, MergeConfiguration]:
    """A recipe as text and as mergekit's configuration; mergekit knows `dam` from here on.

    Args:
        path: the YAML file.
        settings: shared settings that win over the recipe's; None leaves the recipe's.

    Raises:
        DamError: no YAML, or not a mergekit configuration.
    """
    register_dam()
    try:
        source = path.read_text("utf-8")
        content = yaml.safe_load(source)
        changed = {key: value for key, value in settings.items() if value is not None}
        if changed and isinstance(content, dict):
            content["parameters"] = {**(content.get("parameters") or {}), **changed}
            source = yaml.safe_dump(content, sort_keys=False)
        return source, MergeConfiguration.model_validate(content)
    except (yaml.YAMLError, ValueError, RuntimeError) as error:
        raise DamError(
            f"recipe {path}", expected="a mergekit configuration", got=" ".join(str(error).split())[:200],
            cure="See the example in the README.",
        ) from error  # fmt: skip


def dam_plan(config: MergeConfiguration, options: MergeOptions) -> Plan:
    """The plan of a `dam` recipe.

    Raises:
        DamError: another merge method, or anything that `plan_of` refuses.
    """
    if config.merge_method != "dam":
        raise DamError(
            "merge_method", expected="dam", got=str(config.merge_method),
            cure="Use `mergekit-dam yaml` for recipes of other methods.",
        )  # fmt: skip
    return plan_of(config, options)
