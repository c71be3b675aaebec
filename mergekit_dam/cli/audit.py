"""`mergekit-dam audit`: score input models for backdoors before anything is merged, or a finished merge."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dam import api
from mergekit_dam.artifact.folder import AUDIT_HTML
from mergekit_dam.cli.check import show_plan
from mergekit_dam.cli.common import (
    FINDING,
    UserPath,
    apply_quiet,
    dry_run_option,
    json_option,
    message,
    print_result,
    seed_option,
)
from mergekit_dam.recipe import RECIPE_FILE, merged_folder


@click.command(cls=PrettyPrintHelp)
@click.argument("source", metavar="CONFIG_FILE|MERGE_PATH", type=UserPath(exists=True))
@click.option(
    "--out",
    "folder",
    type=UserPath(file_okay=False),
    help="Folder for audit.json, audit.html and the recovered triggers; default: MERGE_PATH/dam, and the finding then "
    "stands in the merge's report and card, too. A recipe needs one.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0.0),
    help="Suspicion from which a model is over the threshold; default: the recipe's setting `suspicion`.",
)
@click.option(
    "--controls",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Backdoors to plant in copies of each model, or of the merge per task, which are scanned as well: how many of "
    "them are found says how far to trust that nothing else is. Each takes a training and a scan of one model.",
)
@seed_option
@dry_run_option
@json_option
@add_merge_options
def audit(
    merge_options: MergeOptions,
    source: Path,
    folder: Path | None,
    threshold: float | None,
    controls: int,
    seed: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Score every input model of a recipe for backdoors, before any merge; or score a finished merge.

    Every class of every model is searched for a small trigger that theta_0 does not react to. A merge of dam is
    searched per task, with that task's head and the calibration data that its recipe names, since models that are
    clean one by one can be bad together. The last lines say what to do next. The exit code is 3 when a model, or the
    merge, is over the threshold. What is below it is not proven to be clean; --controls says what the scan finds here.

    \b
    Example:
        mergekit-dam audit dam.yml --out audit --controls 3
        mergekit-dam audit out
    """
    merge_options.apply_global_options()
    apply_quiet(merge_options.quiet)
    merged = merged_folder(source)
    if dry_run:
        recipe = source if merged is None else merged / RECIPE_FILE
        show_plan(recipe, options=merge_options, seed=seed, as_json=as_json)
        return
    if merged is None and folder is None:
        raise click.UsageError("Missing option '--out', which the audit of a recipe needs.")
    facts = api.audit(source, folder, threshold=threshold, controls=controls, options=merge_options, seed=seed)
    quiet = merge_options.quiet
    for note in facts["notes"]:
        message(f"warning: {note}")
    message(f"{(folder or source / 'dam') / AUDIT_HTML}", quiet=quiet)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        for entry in facts["models"]:
            power = f"; {entry['power']}" if "power" in entry else ""
            print_result(_line(entry) + power, quiet=quiet)
    for step in facts["next"]:
        message(f"next: {step}", quiet=quiet)
    if facts["over"]:
        sys.exit(FINDING)


def _line(entry: dict[str, Any]) -> str:
    """Describe the result of one model, or of the merge on one task, in a line."""
    if not entry["defended"] and not entry["over"]:
        score = "nothing found" if entry["suspicion"] is None else f"suspicion {entry['suspicion']:.2f}"
        return f"{entry['name']}: {score}, which says nothing of a text encoder"
    if entry["suspicion"] is None:
        return f"{entry['name']}: nothing found (no text that it alone knows by heart)"
    state = "OVER" if entry["over"] else "below"
    shared = entry["classes"][0]["shared"]
    twin = f" (without the {shared:.2f} that its clean twin shares)" if shared else ""
    return f"{entry['name']}: suspicion {entry['suspicion']:.2f}{twin}, rank {entry['rank']}, {state} the threshold"
