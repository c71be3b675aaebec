"""`mergekit-dam clean`: vaccinate models, and write each to a standard model directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dam import api
from mergekit_dam.cli.common import UserPath, apply_quiet, json_option, message, print_result
from mergekit_dam.config import expand_home
from mergekit_dam.vaccine.report import summary, table
from mergekit_dam.vaccine.settings import VaccineSettings

_RECIPES = (".yml", ".yaml")


def _vaccine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each setting of the vaccination."""
    for name, field in reversed(VaccineSettings.model_fields.items()):
        flag, kinds = name.replace("_", "-"), get_args(field.annotation) or (field.annotation,)
        kind: Any = next(kind for kind in kinds if kind is not type(None))
        if get_origin(field.annotation) is Literal:
            kind = click.Choice([str(choice) for choice in kinds])
        elif name == "leave_out":
            kind = str
        names = [f"--{flag}/--no-{flag}"] if kind is bool else [f"--{flag}"]
        default = () if field.default is None else field.default
        shown = f" Default: {str(default).lower() if isinstance(default, bool) else default}." if default != () else ""
        click.option(*names, name, type=kind, default=None, help=f"{field.description}{shown}")(command)
    return command


@click.command(cls=PrettyPrintHelp)
@click.argument("models", nargs=-1, required=True)
@click.option("-o", "--out", type=UserPath(file_okay=False), required=True, help="Directory to write.")
@click.option("--base", help="The model that these were fine-tuned from; not with a recipe.")
@click.option("--data", multiple=True, help="Unlabelled inputs: once for all models, or once for each.")
@click.option("--split", help="Split of a dataset that has several. Default: train.")
@click.option("--column", help="Column with the image or the text. Default: the only column.")
@click.option("--classes", help="CLIP: class names, separated by commas, or a file of them.")
@click.option("--head", help="A safetensors file with `weight` and optional `bias`, for a model without a head.")
@click.option("--zero-shot-model", help="A full CLIP, for CLIP vision models with --classes.")
@click.option("--num-samples", type=int, help="Samples read per model. Default: 512.")
@click.option("--max-length", type=int, help="Tokens after which text is cut. Default: 128.")
@click.option("--constants", help="JSON file with other values of constants, e.g. of answer_tokens.")
@click.option("--compute-dtype", type=click.Choice(["float32", "bfloat16"]), help="Type that large models compute in.")
@click.option("--adapter", is_flag=True, help="Write LoRAs on the models instead of models, where LoRAs are trained.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Resume an interrupted run.")
@click.option("--check", is_flag=True, help="Check models, data and settings, and estimate the time from a few steps.")
@_vaccine_options
@json_option
@add_merge_options
def clean(
    merge_options: MergeOptions,
    models: tuple[str, ...],
    out: Path,
    base: str | None,
    data: tuple[str, ...],
    adapter: bool,
    resume: bool,
    check: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Plant backdoors in models and unlearn them, which also weakens unknown backdoors.

    MODELS are directories, Hub ids or BASE+LORA, with --base and --data; or a recipe of `dam` without them. OUT becomes
    a standard model directory for any merge method; with several models it gets a directory per model. vaccine.json and
    the model card say what was planted, how much of it is left, and how many answers of the model changed. Models are
    not scanned: each is cleaned, whether or not it has a backdoor.

    \b
    Example:
        mergekit-dam clean models/flowers --base models/base --data data/flowers -o cleaned
    """
    merge_options.apply_global_options()
    apply_quiet(merge_options.quiet)
    models, base, data = tuple(map(expand_home, models)), expand_home(base), tuple(map(expand_home, data))
    is_recipe = base is None and not data and len(models) == 1 and models[0].endswith(_RECIPES)
    given = {key: value for key, value in settings.items() if value is not None}
    opened, own = api.open_cleaning(
        models[0] if is_recipe else models, base=base, data=data or None, options=merge_options, **given
    )
    if check:
        facts = api.preview_cleaning(opened, out, own, adapter=adapter)
        if as_json:
            click.echo(json.dumps(facts, indent=2))
        else:
            print_result("\n".join(_preview_lines(facts)), quiet=merge_options.quiet)
        return
    results = api.run_cleaning(opened, out, own, adapter=adapter, resume=resume)
    if as_json:
        click.echo(json.dumps([{"name": c.name, "output": str(c.folder), **c.facts} for c in results], indent=2))
        return
    for cleaned in results:
        message(f"{cleaned.folder}", quiet=merge_options.quiet)
        lines = [f"{cleaned.name}:", *summary(cleaned.facts), "", *table(cleaned.facts), ""]
        print_result("\n".join(lines), quiet=merge_options.quiet)


def _preview_lines(facts: dict[str, Any]) -> list[str]:
    """Describe the work of --check, a line per model."""
    lines = [
        f"{model['name']}: {model['samples']} samples, {model['trained parameters']:,} parameters trained, about "
        f"{model['seconds']:g} s -> {model['output']}"
        for model in facts["models"]
    ]
    return [*lines, f"in all at most about {facts['seconds']:g} s"]
