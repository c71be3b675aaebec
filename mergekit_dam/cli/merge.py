"""`mergekit-dam merge`: learn masks, merge with mergekit, verify the output, write the report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dam.api import run_audit
from mergekit_dam.artifact.folder import AUDIT_HTML
from mergekit_dam.artifact.masks_file import MASKS_FILE, load
from mergekit_dam.cli.check import show_plan
from mergekit_dam.cli.common import (
    apply_quiet,
    config_file,
    dry_run_option,
    json_option,
    lm_eval_option,
    message,
    out_path,
    print_result,
    print_suspects,
    resume_option,
    seed_option,
)
from mergekit_dam.config import DamConfig
from mergekit_dam.engine.device import device_of
from mergekit_dam.evaluation.lm_harness import Harness, format_results
from mergekit_dam.evaluation.results import MERGE, add_measurement
from mergekit_dam.plugin.options import refuse_launcher
from mergekit_dam.publish.report import write_report
from mergekit_dam.recipe import open_recipe
from mergekit_dam.scan.advice import not_scanned, suspect_lines


@click.command(cls=PrettyPrintHelp)
@config_file
@out_path
@seed_option
@resume_option
@dry_run_option
@json_option
@click.option(
    "--scan/--no-scan",
    default=None,
    help="Scan the finished merge for backdoors, as `audit OUT_PATH` does. Default: where that takes less than a "
    "fifth of learning's passes; elsewhere the command is printed.",
)
@click.option("--report/--no-report", default=True, show_default=True, help="Write OUT_PATH/dam/report.html and .json.")
@lm_eval_option
@add_merge_options
def merge(
    merge_options: MergeOptions,
    config_file: Path,
    out_path: Path,
    seed: int | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    scan: bool | None,
    report: bool,
    lm_eval: str | None,
) -> None:
    """Learn the masks of a recipe, merge with them, and write a report; or run a recipe of any other method.

    OUT_PATH becomes mergekit's usual directory; OUT_PATH/dam holds the masks, the recovered triggers, the log of every
    step, report.html and, if the merge was scanned, audit.html. Other methods than dam have no masks, no scan and no
    report. With every method, unknown settings are refused, and the output's tensors are compared with the base's.

    \b
    Example:
        mergekit-dam merge dam.yml out
        mergekit-dam merge ties.yml out
    """
    merge_options.apply_global_options()
    apply_quiet(merge_options.quiet)
    if dry_run:
        show_plan(config_file, options=merge_options, seed=seed, as_json=as_json)
        return
    refuse_launcher()
    harness = None if lm_eval is None else Harness.of(lm_eval)
    begun = time.perf_counter()
    opened = open_recipe(config_file, options=merge_options, seed=seed)
    config = opened.plan.config if opened.is_dam else DamConfig()
    device = device_of(config.device)
    masks = opened.merge(out_path, resume=resume)
    outcome: dict[str, Any] = {"output": str(out_path)}
    if opened.is_dam:
        file = out_path / "dam" / MASKS_FILE
        masks = masks or load(file)
        outcome["masks"] = str(file)
    found = None
    if opened.scans_merge(scan):
        found = run_audit(opened, None, source=out_path, merged=out_path)
        outcome["audit"] = str(out_path / "dam" / AUDIT_HTML)
    elif opened.is_dam and scan is None:
        message(not_scanned(out_path), quiet=merge_options.quiet)
    benchmarks = None
    if harness is not None:
        benchmarks = harness.measure(out_path, device=device, seed=config.seed)
        add_measurement(out_path / "dam", "after", {"harness": {MERGE: benchmarks}})
    if report and masks is not None:
        page, notes = write_report(out_path, seconds=time.perf_counter() - begun, masks=masks)
        for note in notes:
            message(note, quiet=merge_options.quiet)
        outcome["report"] = str(page)
    lines = [*outcome.values(), *(format_results(benchmarks) if benchmarks is not None else [])]
    if benchmarks is not None:
        outcome["harness"] = benchmarks
    if masks is not None:
        outcome["suspects"] = print_suspects(masks.metadata, quiet=merge_options.quiet)
    if found is not None:
        outcome["merge_scan"] = {"over": found["over"], "next": found["next"]}
        for line in suspect_lines(found):
            message(line)  # also with --quiet: the output is written, and the exit code is 0
    facts = {**outcome, "seconds": round(time.perf_counter() - begun, 1)}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        print_result("\n".join(lines), quiet=merge_options.quiet)
