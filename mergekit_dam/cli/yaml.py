"""`mergekit-dam yaml`: mergekit-yaml with our checks before and after."""

from __future__ import annotations

import json
from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dam.cli.common import config_file, hush, json_option, out_path, result
from mergekit_dam.plugin.options import refuse_launcher
from mergekit_dam.recipe import prepare


@click.command(cls=PrettyPrintHelp)
@config_file
@out_path
@json_option
@add_merge_options
def yaml(merge_options: MergeOptions, config_file: Path, out_path: Path, as_json: bool) -> None:
    """Run any recipe as mergekit-yaml does, strict about settings, and compare the output with the base.

    \b
    Example:
        mergekit-dam yaml ties.yml out
    """
    refuse_launcher()
    merge_options.apply_global_options()
    hush(merge_options.quiet)
    prepare(config_file, options=merge_options).merge(out_path)
    if as_json:
        click.echo(json.dumps({"output": str(out_path)}, indent=2))
    else:
        result(str(out_path), quiet=merge_options.quiet)
