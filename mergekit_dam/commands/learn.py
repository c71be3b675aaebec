"""`mergekit-dam learn`: the masks of a recipe, without merging."""

from __future__ import annotations

import json
from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dam.artifact import MASKS_FILE
from mergekit_dam.artifact_folder import copy_artifact
from mergekit_dam.commands.check import show_plan
from mergekit_dam.commands.common import (
    config_file,
    dam_plan,
    dry_run_option,
    json_option,
    learning_cache,
    out_path,
    read_recipe,
    resume_option,
    say,
    seed_option,
    suspects_of,
)
from mergekit_dam.distributed.processes import joined
from mergekit_dam.errors import DamError
from mergekit_dam.learn import learn_masks


@click.command(cls=PrettyPrintHelp)
@config_file
@out_path
@seed_option
@resume_option
@dry_run_option
@json_option
@add_merge_options
def learn(
    merge_options: MergeOptions, config_file: Path, out_path: Path, seed: int | None, resume: bool, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Learn the masks of a recipe into OUT_PATH, without merging.

    On several machines: `accelerate launch -m mergekit_dam learn CONFIG_FILE OUT_PATH`, with MERGEKIT_DAM_CACHE in a
    folder that all of them see.
    The setting `masks: OUT_PATH/dam_masks.safetensors` then merges with them, in any process and on any machine.
    """
    merge_options.apply_global_options()
    plan = dam_plan(read_recipe(config_file, seed=seed)[1], merge_options)
    if plan.config.masks is not None:
        raise DamError(
            "setting 'masks'", expected="none, where masks are to be learned", got=plan.config.masks,
            cure="Remove it, or merge with these masks.",
        )  # fmt: skip
    if dry_run:
        show_plan(plan, as_json=as_json, quiet=merge_options.quiet)
        return
    with (
        learning_cache(resume=resume),
        joined(device=plan.config.device, timeout=plan.config.worker_timeout) as (shards, device),
    ):
        folder, masks = learn_masks(plan, quiet=merge_options.quiet, shards=shards, device=device)
        if shards.rank > 0:
            return
        try:
            copy_artifact(folder, out_path)
        except OSError as error:
            raise DamError(
                f"output {out_path}", expected="a folder that can be written", got=str(error),
                cure="Choose another output directory.",
            ) from error  # fmt: skip
    file = out_path / MASKS_FILE
    found = suspects_of(masks.metadata)
    for one in found:
        say(f"suspect: {one['task']}, class {one['target']} (suspicion {one['suspicion']})", quiet=merge_options.quiet)
    result = {"masks": str(file), "densities": masks.metadata.get("densities", {}), "suspects": found}
    click.echo(json.dumps(result, indent=2) if as_json else str(file))
