"""What several commands share: arguments, and how a recipe is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml
from mergekit.config import MergeConfiguration

from mergekit_dam.errors import DamError
from mergekit_dam.method import register_dam

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
config_file: Decorator = click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))


def read_recipe(path: Path) -> tuple[str, MergeConfiguration]:
    """A recipe as text and as mergekit's configuration; mergekit knows `dam` from here on.

    Raises:
        DamError: no YAML, or not a mergekit configuration.
    """
    register_dam()
    source = path.read_text("utf-8")
    try:
        return source, MergeConfiguration.model_validate(yaml.safe_load(source))
    except (yaml.YAMLError, ValueError, RuntimeError) as error:
        raise DamError(
            f"recipe {path}", expected="a mergekit configuration", got=" ".join(str(error).split())[:200],
            cure="See the example in the README.",
        ) from error  # fmt: skip
