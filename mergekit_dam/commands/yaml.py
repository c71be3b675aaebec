"""`mergekit-dam yaml`: mergekit-yaml with our checks before and after."""

from __future__ import annotations

from pathlib import Path

import click
from mergekit.merge import run_merge
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dam.commands.common import compare_with_base, config_file, out_path, read_recipe
from mergekit_dam.recipe import plan_of


@click.command(cls=PrettyPrintHelp)
@config_file
@out_path
@add_merge_options
def yaml(merge_options: MergeOptions, config_file: Path, out_path: Path) -> None:
    """Run any recipe as mergekit-yaml does, strict about settings, and compare the output with the base."""
    merge_options.apply_global_options()
    source, config = read_recipe(config_file)
    if config.merge_method == "dam":
        plan_of(config, merge_options)
    run_merge(config, str(out_path), merge_options, config_source=source)
    compare_with_base(config, out_path, merge_options)
