"""`mergekit-dam merge`: mergekit-yaml with our checks before and after."""

from __future__ import annotations

from pathlib import Path

import click
from mergekit.common import dtype_from_name
from mergekit.merge import run_merge
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dam.commands.common import config_file, read_recipe
from mergekit_dam.config import ModelSettings
from mergekit_dam.plan import model_input
from mergekit_dam.recipe import plan_of
from mergekit_dam.verify import verify_output


@click.command(cls=PrettyPrintHelp)
@config_file
@click.argument("out_path", type=click.Path(file_okay=False, path_type=Path))
@add_merge_options
def merge(merge_options: MergeOptions, config_file: Path, out_path: Path) -> None:
    """Merge as mergekit-yaml does, strict about settings, and compare the output with the base."""
    merge_options.apply_global_options()
    source, config = read_recipe(config_file)
    if config.merge_method == "dam":
        plan_of(config, merge_options)
    run_merge(config, str(out_path), merge_options, config_source=source)
    if config.base_model is not None:
        base = model_input("base", config.base_model, ModelSettings(), merge_options)
        dtype = dtype_from_name(config.out_dtype or config.dtype)
        verify_output(out_path, base.path, dtype=dtype, base_config=base.config)
