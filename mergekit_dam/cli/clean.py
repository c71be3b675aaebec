"""`mergekit-dam clean`: models vaccinated, each into a standard model directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dam import api
from mergekit_dam.cli.common import UserPath, at_home, hush, json_option, result, say
from mergekit_dam.vaccine.report import summary, table
from mergekit_dam.vaccine.settings import VaccineSettings

_RECIPES = (".yml", ".yaml")


def _vaccine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option per setting of the vaccination."""
    for name, field in reversed(VaccineSettings.model_fields.items()):
        flag, kinds = name.replace("_", "-"), get_args(field.annotation) or (field.annotation,)
        kind: Any = next(kind for kind in kinds if kind is not type(None))
        if get_origin(field.annotation) is Literal:
            kind = click.Choice([str(choice) for choice in kinds])
        elif name == "leave_out":
            kind = str
        names = [f"--{flag}/--no-{flag}"] if kind is bool else [f"--{flag}"]
        known = () if field.default is None else field.default
        told = f" Default: {str(known).lower() if isinstance(known, bool) else known}." if known != () else ""
        click.option(*names, name, type=kind, default=None, help=f"{field.description}{told}")(command)
    return command


@click.command(cls=PrettyPrintHelp)
@click.argument("models", nargs=-1, required=True)
@click.option("-o", "--out", type=UserPath(file_okay=False), required=True, help="Directory to write.")
@click.option("--base", help="What the models were fine-tuned from; not with a recipe.")
@click.option("--data", multiple=True, help="Unlabelled inputs: once for all models, or once for each.")
@click.option("--split", help="Split of a dataset that has several. Default: train.")
@click.option("--column", help="Column with the image or the text. Default: the only one there is.")
@click.option("--classes", help="CLIP: class names, separated by commas, or a file of them.")
@click.option("--head", help="A safetensors file with `weight` and optional `bias`, for a model without a head.")
@click.option("--zero-shot-model", help="A full CLIP, for CLIP vision models with --classes.")
@click.option("--num-samples", type=int, help="Samples read per model. Default: 512.")
@click.option("--max-length", type=int, help="Tokens after which text is cut. Default: 128.")
@click.option("--constants", help="JSON file with other values of constants, e.g. of answer_tokens.")
@click.option("--compute-dtype", type=click.Choice(["float32", "bfloat16"]), help="What large models compute in.")
@click.option("--adapter", is_flag=True, help="Write LoRAs on the models instead of models, where LoRAs are trained.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where an earlier run was cut short.")
@click.option("--check", is_flag=True, help="Check models, data and settings, measure a few steps, and tell the time.")
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
    """Plant backdoors of our own in models and unlearn them, so that unknown ones go with them.

    MODELS are directories, Hub ids or BASE+LORA, with --base and --data; or one recipe of `dam`, which names all of
    that. OUT becomes a standard model directory that any merge method takes (of several models: one per model in it),
    with vaccine.json and a model card: what was planted, how much of it is left, and how far the model still
    answers as before. Nothing is searched: a model is cleaned whether or not something is wrong with it.

    \b
    Example:
        mergekit-dam clean models/flowers --base models/base --data data/flowers -o cleaned
    """
    merge_options.apply_global_options()
    hush(merge_options.quiet)
    models, base, data = tuple(map(at_home, models)), at_home(base), tuple(map(at_home, data))
    is_recipe = base is None and not data and len(models) == 1 and models[0].endswith(_RECIPES)
    given = {key: value for key, value in settings.items() if value is not None}
    prepared, own = api.prepare_cleaning(
        models[0] if is_recipe else models, base=base, data=data or None, options=merge_options, **given
    )
    if check:
        facts = api.expected_cleaning(prepared, out, own, adapter=adapter)
        if as_json:
            click.echo(json.dumps(facts, indent=2))
        else:
            result("\n".join(_told(facts)), quiet=merge_options.quiet)
        return
    found = api.cleaned(prepared, out, own, adapter=adapter, resume=resume)
    if as_json:
        click.echo(json.dumps([{"name": c.name, "output": str(c.folder), **c.facts} for c in found], indent=2))
        return
    for one in found:
        say(f"{one.folder}", quiet=merge_options.quiet)
        lines = [f"{one.name}:", *summary(one.facts), "", *table(one.facts), ""]
        result("\n".join(lines), quiet=merge_options.quiet)


def _told(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"{one['name']}: {one['samples']} samples, {one['trained parameters']:,} parameters trained, about "
        f"{one['seconds']:g} s -> {one['output']}"
        for one in facts["models"]
    ]
    return [*lines, f"in all at most about {facts['seconds']:g} s"]
