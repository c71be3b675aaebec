"""`mergekit-dam eval`: measure accuracy and attack success of a model directory on labelled data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from mergekit_dam.artifact.masks_file import MASKS_FILE, load
from mergekit_dam.cli.common import (
    apply_quiet,
    existing_folder,
    json_option,
    lm_eval_option,
    message,
    print_result,
    quiet_option,
)
from mergekit_dam.config import expand_home
from mergekit_dam.engine.device import device_of
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.attack_text import EXAMPLE, parse_trigger
from mergekit_dam.evaluation.labelled_data import ReadoutOptions, Source, labelled_data, text_target_data
from mergekit_dam.evaluation.lm_harness import Harness, format_results
from mergekit_dam.evaluation.metrics import (
    LabelledData,
    accuracy,
    attack_success_rate,
    calibration_digests,
    predictions,
    refuse_overlap,
    without_seen,
)
from mergekit_dam.evaluation.results import MERGE, Rate, When, add_measurement
from mergekit_dam.models.load_merged import load_merged
from mergekit_dam.publish.report import write_report


@click.command()
@click.argument("model_path", type=existing_folder)
@click.option("--data", help="Labelled file, folder (of shards, or with a sub-folder per class), or Hub dataset id.")
@click.option("--task", help="Input model whose head reads the merge's output; default: the model's own head.")
@click.option("--split", default="test", show_default=True, help="Split of a dataset that has several.")
@click.option("--column", help="Column with the image, text or chat; default: found as for `column`.")
@click.option("--label-column", default="label", show_default=True, help="Column with class numbers or names.")
@click.option("--classes", help="CLIP and causal LMs: class names, separated by commas, or a file of them.")
@click.option("--head", help="A safetensors file with `weight` and optional `bias`, for a model without a head.")
@click.option("--zero-shot-model", help="A full CLIP, for a CLIP vision model with --classes.")
@click.option("--trigger", help=f"Trigger whose success is measured. {EXAMPLE}")
@click.option("--target", type=click.IntRange(0), help="Class that the trigger should cause; with --trigger.")
@click.option(
    "--target-text",
    metavar="TEXT",
    help="Causal LMs: text that the trigger should cause, in place of --target; the data need no labels.",
)
@click.option("--drop-seen", is_flag=True, help="Leave out samples that the merge was calibrated on.")
@click.option("--num-samples", type=click.IntRange(1), help="Number of samples; default: all.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the choice of samples.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or an accelerator.")
@click.option("--save", type=existing_folder, help="Add the counts to the report of this merge (a directory).")
@lm_eval_option
@json_option
@quiet_option
def eval(
    model_path: Path,
    data: str | None,
    task: str | None,
    split: str,
    column: str | None,
    label_column: str,
    classes: str | None,
    head: str | None,
    zero_shot_model: str | None,
    trigger: str | None,
    target: int | None,
    target_text: str | None,
    drop_seen: bool,
    num_samples: int | None,
    seed: int,
    device: str,
    save: Path | None,
    lm_eval: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure a model directory: accuracy on labelled data, and the success of a trigger that you give.

    Give --data, or for causal LMs --lm-eval, or both.
    Attack success is the share of triggered samples of other classes that the model gives the target class. With
    --target-text it is the share of all triggered prompts whose greedy answer contains the text; an answer has 32
    tokens more than the text. Samples that the merge was calibrated on are refused, or left out with --drop-seen.

    \b
    Example:
        mergekit-dam eval out --task cars --data labelled --save out
        mergekit-dam eval out --task cars --data labelled --trigger "patch(size=5)" --target 2
    """
    if data is None and lm_eval is None:
        raise click.UsageError("Give labelled data as --data, or for causal LMs tasks as --lm-eval.")
    if target is not None and target_text is not None:
        raise click.UsageError("Give --target (a class) or --target-text (a text of a causal LM), not both.")
    goal = target_text if target is None else target
    if (trigger is None) != (goal is None):
        raise DamError(
            "--trigger and --target",
            expected="both or neither",
            got="only one",
            cure="Give the class that the trigger should cause as --target N, or the text as --target-text TEXT.",
        )
    if data is None and trigger is not None:
        raise click.UsageError("--trigger needs labelled data: --data.")
    apply_quiet(quiet)
    data, head, classes, zero_shot_model = map(expand_home, (data, head, classes, zero_shot_model))
    harness = None if lm_eval is None else Harness.of(lm_eval)
    when: When = "after" if save is not None and save.resolve() == model_path.resolve() else "before"
    name = task or (model_path.resolve().name if save is not None else model_path.name) or "model"
    measured: dict[str, Any] = {"model": str(model_path)}
    lines: list[str] = []
    if data is not None:
        readout = ReadoutOptions(classes, head, zero_shot_model)
        source = Source(data, split, column, label_column, num_samples, seed)
        attack = None if trigger is None or goal is None else (trigger, goal)
        masks_files = [folder / "dam" / MASKS_FILE for folder in (model_path, save) if folder is not None]
        seen = _SeenSamples(next((file for file in masks_files if file.is_file()), None), drop_seen, quiet)
        measured |= _measure(
            model_path, task, name, source, readout, attack, seen, device=device_of(device), quiet=quiet
        )
        lines += _lines(measured)
    if harness is not None:
        benchmarks = harness.measure(model_path, device=device_of(device), limit=num_samples, seed=seed)
        measured["harness"] = {MERGE if when == "after" else name: benchmarks}
        lines += format_results(benchmarks)
    if save is not None:
        add_measurement(save / "dam", when, measured)
        message(f"added to {_update_report(save, quiet=quiet)}", quiet=quiet)
    if as_json:
        click.echo(json.dumps(measured, indent=2))
    else:
        print_result("\n".join(lines), quiet=quiet)


def _update_report(output: Path, *, quiet: bool) -> Path:
    """Write the report of a merge again, with the new measurement; return the page, or `dam` without masks."""
    if not (output / "dam" / MASKS_FILE).is_file():
        return output / "dam"
    page, notes = write_report(output)
    for note in notes:
        message(note, quiet=quiet)
    return page


@dataclass(frozen=True)
class _SeenSamples:
    """Treatment of samples that the merge was calibrated on: refuse or drop them.

    Attributes:
        masks: masks file in the model directory, else in the merge that --save names; None: samples are unknown.
        drop: drop the samples; else refuse them.
        quiet: no messages.
    """

    masks: Path | None
    drop: bool
    quiet: bool

    def without(self, samples: LabelledData, model_path: Path) -> LabelledData:
        """Return the samples that may be measured on."""
        if self.drop and self.masks is None:
            message(f"no {MASKS_FILE} in the model or --save: no sample is known to be seen", quiet=self.quiet)
        if self.masks is None:
            return samples
        if not self.drop:
            if model_path in self.masks.parents:
                refuse_overlap(samples, calibration_digests(self.masks))
            return samples
        unseen = without_seen(samples, calibration_digests(self.masks))
        message(
            f"dropped {len(samples) - len(unseen)} of {len(samples)} samples that the merge has seen", quiet=self.quiet
        )
        return unseen


def _measure(
    model_path: Path,
    task: str | None,
    name: str,
    source: Source,
    readout: ReadoutOptions,
    attack: tuple[str, int | str] | None,
    seen: _SeenSamples,
    *,
    device: torch.device,
    quiet: bool,
) -> dict[str, Any]:
    """Measure accuracy and attack success; options that were not given come from the merge's record of the task."""
    trigger = None if attack is None else parse_trigger(attack[0])
    is_text = isinstance(attack[1], str) if attack is not None else False
    own = _recorded_settings(model_path, task)
    readout = ReadoutOptions(*(given or own.get(key) for key, given in asdict(readout).items()))
    model = load_merged(model_path, task, device=device)
    folders = [folder for folder in (_folder(own.get("path")), model_path) if folder is not None]
    torch.manual_seed(source.seed)
    counts: dict[str, Any] = {"accuracy": {}, "attack_success": {}, "datasets": {name: source.data}}
    if not is_text or readout.classes is not None:
        samples = seen.without(labelled_data(model, folders, name, source, readout), model_path)
        message(f"{len(samples)} samples of {source.data}", quiet=quiet)
        counts["accuracy"][name] = _counts(accuracy(model, samples))
    if attack is not None and trigger is not None:
        target = attack[1]
        if isinstance(target, str):
            samples, target = seen.without(text_target_data(model, folders, name, source, target), model_path), 1
            message(f"{len(samples)} prompts of {source.data}", quiet=quiet)
            counts["without_trigger"] = {name: _counts(Rate(int(predictions(model, samples).sum()), len(samples)))}
        goal = repr(attack[1]) if is_text else attack[1]
        rate = attack_success_rate(model, samples, trigger, target)
        counts["attack_success"] = {f"{attack[0]} -> {goal}": {name: _counts(rate)}}
    return counts


def _counts(rate: Rate) -> list[int]:
    """Return [hits, total]."""
    return [rate.hits, rate.total]


def _lines(result: Mapping[str, Any]) -> list[str]:
    """Format measured counts, a line per rate."""
    lines = [f"{task}: accuracy {Rate(*counts)}" for task, counts in result["accuracy"].items()]
    for attack, rates in result["attack_success"].items():
        lines += [f"{task}: attack success {Rate(*counts)} of {attack}" for task, counts in rates.items()]
    for task, counts in result.get("without_trigger", {}).items():
        lines.append(f"{task}: {Rate(*counts)} say it without the trigger")
    return lines


def _recorded_settings(model_path: Path, task: str | None) -> dict[str, Any]:
    """Return settings and path of an input model, as recorded in the masks file of a merge; else nothing."""
    file = model_path / "dam" / MASKS_FILE
    if task is None or not file.is_file():
        return {}
    metadata = load(file).metadata
    for model in metadata["models"]:
        if model["name"] == task:
            shared = {"zero_shot_model": metadata["settings"].get("zero_shot_model")}
            return {**model["settings"], **shared, "path": model["model"]}
    return {}


def _folder(path: str | None) -> Path | None:
    """Return the path if it is a folder."""
    return Path(path) if path is not None and Path(path).is_dir() else None
