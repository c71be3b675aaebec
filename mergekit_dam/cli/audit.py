"""`mergekit-dam audit`: score input models for backdoors, before anything is merged."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dam.artifact.folder import TRIGGERS_FILE
from mergekit_dam.artifact.scan_file import StoredScan
from mergekit_dam.artifact.triggers_file import load_triggers, save_triggers
from mergekit_dam.cli.check import show_plan
from mergekit_dam.cli.common import (
    FINDING,
    UserPath,
    apply_quiet,
    config_file,
    dry_run_option,
    json_option,
    message,
    print_result,
    seed_option,
)
from mergekit_dam.engine.device import device_of
from mergekit_dam.engine.progress import progress_bar
from mergekit_dam.errors import DamError
from mergekit_dam.io.files import write_atomic
from mergekit_dam.io.untrusted import require_no_links_out
from mergekit_dam.publish.page import render, shown_triggers
from mergekit_dam.recipe import open_recipe
from mergekit_dam.scan.audit import audit as run
from mergekit_dam.tasks import build_tasks
from mergekit_dam.tasks.content import digests_of

AUDIT_JSON, AUDIT_HTML = "audit.json", "audit.html"


@click.command(cls=PrettyPrintHelp)
@config_file
@click.option(
    "--out",
    "folder",
    type=UserPath(file_okay=False),
    required=True,
    help="Folder for audit.json, audit.html and the recovered triggers.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0.0),
    help="Suspicion from which a model is over the threshold; default: the recipe's setting `suspicion`.",
)
@seed_option
@dry_run_option
@json_option
@add_merge_options
def audit(
    merge_options: MergeOptions,
    config_file: Path,
    folder: Path,
    threshold: float | None,
    seed: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Score every input model of a recipe for backdoors, before any merge.

    Every class of every model is searched for a small trigger that theta_0 does not react to. The exit code is 3 when
    a model is over the threshold. A model below it is not proven to be clean.

    \b
    Example:
        mergekit-dam audit dam.yml --out audit
    """
    merge_options.apply_global_options()
    apply_quiet(merge_options.quiet)
    if dry_run:
        show_plan(config_file, options=merge_options, seed=seed, as_json=as_json)
        return
    plan = open_recipe(config_file, options=merge_options, seed=seed).plan
    quiet, device = merge_options.quiet, device_of(plan.config.device)
    require_no_links_out(folder, ("",))
    tasks = build_tasks(plan, device)
    seconds: dict[str, float] = {}

    def progress(steps: Iterable[int], title: str) -> Iterable[int]:
        begun = time.perf_counter()
        yield from progress_bar(steps, title, quiet=quiet)
        seconds[title] = round(time.perf_counter() - begun, 3)

    result = run(
        plan,
        tasks,
        threshold=plan.config.suspicion if threshold is None else threshold,
        device=device,
        progress=progress,
        known=StoredScan(plan, tasks, digests_of(plan), seconds, quiet=quiet),
    )
    for note in result.facts["notes"]:
        message(f"warning: {note}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_triggers(folder / TRIGGERS_FILE, result.findings, result.tasks, result.suspects)
        triggers = shown_triggers(load_triggers(folder / TRIGGERS_FILE))
        page = render("audit.html.j2", title=f"Audit of {config_file.name}", facts=result.facts, triggers=triggers)
        write_atomic(folder / AUDIT_JSON, json.dumps(result.facts, indent=1))
        write_atomic(folder / AUDIT_HTML, page)
    except OSError as error:
        raise DamError(
            f"output {folder}", expected="a folder that can be written", got=str(error), cure="Choose another --out."
        ) from error
    message(f"{folder / AUDIT_HTML}", quiet=quiet)
    if as_json:
        click.echo(json.dumps(result.facts, indent=2))
    else:
        for entry in result.facts["models"]:
            print_result(_line(entry), quiet=quiet)
    if result.facts["over"]:
        sys.exit(FINDING)


def _line(entry: dict[str, object]) -> str:
    """Describe the result of one model in a line."""
    if not entry["defended"] and not entry["over"]:
        score = "nothing found" if entry["suspicion"] is None else f"suspicion {entry['suspicion']:.2f}"
        return f"{entry['name']}: {score}, which says nothing of a text encoder"
    if entry["suspicion"] is None:
        return f"{entry['name']}: nothing found (no text that it alone knows by heart)"
    state = "OVER" if entry["over"] else "below"
    return f"{entry['name']}: suspicion {entry['suspicion']:.2f}, rank {entry['rank']}, {state} the threshold"
