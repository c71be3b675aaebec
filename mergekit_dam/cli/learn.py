"""`mergekit-dam learn`: learn the masks of a recipe without merging."""

from __future__ import annotations

import json
from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dam.artifact.masks_file import load
from mergekit_dam.cli.check import show_plan
from mergekit_dam.cli.common import (
    apply_quiet,
    config_file,
    dry_run_option,
    json_option,
    out_path,
    print_result,
    print_suspects,
    resume_option,
    seed_option,
)
from mergekit_dam.engine.group import is_first
from mergekit_dam.recipe import open_recipe


@click.command(cls=PrettyPrintHelp)
@config_file
@out_path
@seed_option
@resume_option
@dry_run_option
@json_option
@add_merge_options
def learn(
    merge_options: MergeOptions,
    config_file: Path,
    out_path: Path,
    seed: int | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Learn the masks of a recipe into OUT_PATH, without merging.

    On several machines: `accelerate launch -m mergekit_dam learn CONFIG_FILE OUT_PATH`, with MERGEKIT_DAM_CACHE in a
    folder that all machines share.
    The setting `masks: OUT_PATH/dam_masks.safetensors` then merges with these masks on any machine.

    \b
    Example:
        mergekit-dam learn dam.yml learned
    """
    merge_options.apply_global_options()
    apply_quiet(merge_options.quiet)
    if dry_run:
        show_plan(config_file, options=merge_options, seed=seed, as_json=as_json)
        return
    opened = open_recipe(config_file, options=merge_options, seed=seed)
    file = opened.learn(out_path, resume=resume)
    if not is_first():  # with `accelerate launch` only one process prints the result
        return
    metadata = load(file).metadata
    suspects = print_suspects(metadata, quiet=merge_options.quiet)
    facts = {"masks": str(file), "densities": metadata.get("densities", {}), "suspects": suspects}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        print_result(str(file), quiet=merge_options.quiet)
