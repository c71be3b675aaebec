"""`mergekit-dam merge`: learn, merge with mergekit, verify, report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dam.artifact.masks_file import MASKS_FILE, load
from mergekit_dam.cli.check import show_plan
from mergekit_dam.cli.common import (
    config_file,
    dry_run_option,
    hush,
    json_option,
    lm_eval_option,
    name_suspects,
    out_path,
    result,
    resume_option,
    say,
    seed_option,
)
from mergekit_dam.engine.device import device_of
from mergekit_dam.evaluation.lm_harness import Harness, format_results
from mergekit_dam.evaluation.results import MERGE, add_measurement
from mergekit_dam.plugin.options import refuse_launcher
from mergekit_dam.publish.report import write_report
from mergekit_dam.recipe import prepare


@click.command(cls=PrettyPrintHelp)
@config_file
@out_path
@seed_option
@resume_option
@dry_run_option
@json_option
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
    report: bool,
    lm_eval: str | None,
) -> None:
    """Learn the masks of a recipe, merge with them, and write a report.

    OUT_PATH becomes mergekit's usual directory; OUT_PATH/dam holds the masks, the recovered triggers, the log of every
    step and report.html. The output's tensors are compared with the base's.

    \b
    Example:
        mergekit-dam merge dam.yml out
    """
    merge_options.apply_global_options()
    hush(merge_options.quiet)
    if dry_run:
        show_plan(config_file, options=merge_options, seed=seed, as_json=as_json)
        return
    refuse_launcher()
    harness = None if lm_eval is None else Harness.of(lm_eval)
    begun = time.perf_counter()
    prepared = prepare(config_file, options=merge_options, seed=seed)
    device = device_of(prepared.plan.config.device)  # another method than dam is refused here
    masks = prepared.merge(out_path, resume=resume) or load(out_path / "dam" / MASKS_FILE)
    told: dict[str, Any] = {"output": str(out_path), "masks": str(out_path / "dam" / MASKS_FILE)}
    benchmarks = None
    if harness is not None:
        benchmarks = harness.measure(out_path, device=device, seed=prepared.plan.config.seed)
        add_measurement(out_path / "dam", "after", {"harness": {MERGE: benchmarks}})
    if report:
        page, notes = write_report(out_path, seconds=time.perf_counter() - begun, masks=masks)
        for note in notes:
            say(note, quiet=merge_options.quiet)
        told["report"] = str(page)
    found = name_suspects(masks.metadata, quiet=merge_options.quiet)
    lines = [*told.values(), *(format_results(benchmarks) if benchmarks is not None else [])]
    if benchmarks is not None:
        told["harness"] = benchmarks
    facts = {**told, "suspects": found, "seconds": round(time.perf_counter() - begun, 1)}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        result("\n".join(lines), quiet=merge_options.quiet)
