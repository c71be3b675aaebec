"""What several commands share: arguments, options, exit codes, and how a recipe is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import yaml
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_dam.config import ModelSettings
from mergekit_dam.errors import DamError
from mergekit_dam.learn import cache_folder
from mergekit_dam.method import register_dam
from mergekit_dam.plan import Plan, model_input
from mergekit_dam.recipe import plan_of
from mergekit_dam.verify import verify_output

# 0 success, 1 a fault (DamError), 2 a wrong command line (click)
FINDING = 3  # `check`: the recipe cannot be merged; `audit`: a model is over the threshold

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
existing_folder = click.Path(exists=True, file_okay=False, path_type=Path)
config_file: Decorator = click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
out_path: Decorator = click.argument("out_path", type=click.Path(file_okay=False, path_type=Path))
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
quiet_option: Decorator = click.option(
    "--quiet", is_flag=True, help="Suppress progress bars and other non-essential output"
)
dry_run_option: Decorator = click.option("--dry-run", is_flag=True, help="Say what would be done, as `check` does.")
resume_option: Decorator = click.option(
    "--resume/--no-resume", default=True, show_default=True,
    help="Take masks that were learned before on the same inputs and settings, or learn them anew.",
)  # fmt: skip
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


@contextmanager
def learning_cache(*, resume: bool) -> Iterator[None]:
    """Without `resume` masks are learned in an empty cache, which is gone afterwards; the real one stays as it is."""
    if resume:
        yield
        return
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("MERGEKIT_DAM_CACHE")
    with TemporaryDirectory(prefix="anew-", dir=root) as folder:
        os.environ["MERGEKIT_DAM_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("MERGEKIT_DAM_CACHE")
            if before is not None:
                os.environ["MERGEKIT_DAM_CACHE"] = before


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


def compare_with_base(config: MergeConfiguration, out_path: Path, options: MergeOptions) -> None:
    """Whether every tensor of the base is in the output, with its shape and the type asked for.

    Raises:
        DamError: naming what is missing.
    """
    if config.base_model is not None:
        base = model_input("base", config.base_model, ModelSettings(), options)
        dtype = dtype_from_name(config.out_dtype or config.dtype)
        verify_output(out_path, base.path, dtype=dtype, base_config=base.config)


def suspects_of(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The classes that the masks were fitted against."""
    return [finding for finding in metadata.get("audit", []) if finding.get("suspect")]
