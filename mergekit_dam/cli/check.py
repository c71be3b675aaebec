"""`mergekit-dam check`: show the plan of a recipe without reading a weight."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dam.cli.common import FINDING, apply_quiet, config_file, json_option, message, print_result, seed_option
from mergekit_dam.cli.explain import translated_errors
from mergekit_dam.config import DamConfig, ModelSettings
from mergekit_dam.engine.device import device_of
from mergekit_dam.errors import DamError
from mergekit_dam.learn.estimate import Estimate, estimate, measured_speed
from mergekit_dam.learn.run import num_processes
from mergekit_dam.learn.window_size import window_warning, with_window
from mergekit_dam.models.plan import Plan
from mergekit_dam.recipe import preview
from mergekit_dam.tasks.preflight import longest_texts, preflight


@click.command(cls=PrettyPrintHelp)
@config_file
@seed_option
@json_option
@add_merge_options
def check(merge_options: MergeOptions, config_file: Path, seed: int | None, as_json: bool) -> None:
    """Resolve models, settings, tensors and data of a recipe without reading a weight.

    Of models on the Hub, only configs, tokenizers and the headers of weight files are downloaded.
    The first line says what would be merged, the time and memory that it takes, and which settings are not the default;
    models, data, memory by part and all settings follow. At a fault, the first one is printed with its cure, and the
    exit code is 3.

    \b
    Example:
        mergekit-dam check dam.yml
        mergekit-dam check dam.yml --json
    """
    apply_quiet(merge_options.quiet)
    try:
        with translated_errors("check"):
            show_plan(config_file, options=merge_options, seed=seed, as_json=as_json)
    except DamError as error:
        error.show()
        sys.exit(FINDING)


def show_plan(config_file: Path, *, options: MergeOptions, seed: int | None, as_json: bool) -> None:
    """Print the plan on stdout and warnings on stderr, for `check` and for every `--dry-run` of a recipe.

    Raises:
        DamError: the first fault in recipe, models, data, heads, preprocessing or tokenizers.
    """
    with preview(config_file, options=options, seed=seed) as plan:
        facts, warnings = describe_plan(plan)
    for warning in warnings:
        message(f"warning: {warning}")
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        summary = facts.pop("summary")
        print_result(f"{summary}\n\n{yaml.safe_dump(facts, sort_keys=False).rstrip()}", quiet=options.quiet)


def describe_plan(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Return the plan as JSON, with a sentence for people as `summary`, and warnings."""
    models, warnings = preflight(plan)
    device = device_of(plan.config.device)
    tokens = longest_texts(models)
    processes = num_processes(plan.config)
    learned = with_window(plan, device, workers=processes)
    if learned.config.window not in ("all", plan.config.window):
        warnings.append(window_warning(learned))
    estimated = estimate(learned, processes=processes, speed=measured_speed(plan, device, tokens), tokens=tokens)
    assert estimated.seconds is not None, "the speed is known"
    size = 2**20
    return {
        "summary": summary_of(plan, estimated, device),
        "base": str(plan.base.ref),
        "models": models,
        "tensors": len(plan.tensors),
        "parameters": sum(math.prod(spec.shape) for spec in plan.tensors),
        "estimate": {
            "device": str(device),
            "window": learned.config.window,
            "memory MiB": {part: round(amount / size, 1) for part, amount in estimated.memory_bytes.items()},
            "memory MiB in all": round(sum(estimated.memory_bytes.values()) / size, 1),
            "seconds": [float(f"{bound:.2g}") for bound in estimated.seconds],
        },
        "settings": plan.config.model_dump(exclude={"constants"}),
        "constants": plan.config.constants.model_dump(exclude_unset=True),
    }, warnings


def summary_of(plan: Plan, estimated: Estimate, device: torch.device) -> str:
    """Summarise in a sentence: the merge, its time and memory, and settings that are not the default."""
    parameters = sum(math.prod(spec.shape) for spec in plan.tensors)
    place = "this CPU" if device.type == "cpu" else f"this accelerator ({device})"
    what = f"`dam` will merge {len(plan.models)} models of {_short(parameters)} parameters"
    if plan.config.masks is not None:
        what += f" with the masks of {plan.config.masks}; nothing is learned"
    else:
        assert estimated.seconds is not None, "the speed is known"
        memory = _short(sum(estimated.memory_bytes.values()), "B")
        what += f" in {_span(*estimated.seconds)} and {memory} of memory on {place}"
    defaults = DamConfig(objective=plan.config.objective).named()
    changed = [
        f"{name} {value}" for name, value in plan.config.named().items() if value != defaults[name] and name != "masks"
    ] + [
        f"weight {model.settings.weight} of {model.name}"
        for model in plan.models
        if model.settings.weight != ModelSettings().weight
    ]
    settings = (
        f"set by you, other than the default: {', '.join(changed)}" if changed else "all settings are the default"
    )
    return f"This recipe is fine: {what}; {settings}."


def _span(low: float, high: float) -> str:
    """Format two times in the same unit, with two digits."""
    unit, size = next((u, s) for u, s in _UNITS if high >= 1.5 * s or s == 1)
    first, last = (f"{max(time / size, 0.1):.2g}" if time < 10 * size else f"{time / size:.0f}" for time in (low, high))
    return f"{first} to {last} {unit}"


def _short(number: float, unit: str = "") -> str:
    """Format a number with two digits and a prefix: 22 M, 1.2 GB."""
    prefix, size = next(((p, s) for p, s in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if number >= s), ("", 1))
    value = number / size
    return f"{value:.0f} {prefix}{unit}".rstrip() if value >= 10 else f"{value:.2g} {prefix}{unit}".rstrip()


_UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
