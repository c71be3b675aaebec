"""Write the files that learning leaves beside `dam_masks.safetensors`, and copy them without locks and checkpoints.

dam_masks.safetensors   masks and coefficients (masks_file.py)
triggers.safetensors    triggers that the scan recovered (triggers_file.py)
metrics.jsonl           one flat JSON record per step
run.json                when, where and how long; revisions of the inputs
heads/                  heads that the base lacks, per task: tensors and config

A scan of the merge (`mergekit-dam audit OUT`) leaves audit.json, audit.html and audit_triggers.safetensors beside them;
the report, measurements and the inputs' commits are there, too.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mergekit_dam.artifact.masks_file import MASKS_FILE
from mergekit_dam.io.files import replacing, write_atomic
from mergekit_dam.io.hub_download import INPUTS_FILE
from mergekit_dam.models.plan import Plan, revision_of
from mergekit_dam.tasks import Task

TRIGGERS_FILE, METRICS_FILE, RUN_FILE = "triggers.safetensors", "metrics.jsonl", "run.json"
FILES = (MASKS_FILE, TRIGGERS_FILE, METRICS_FILE, RUN_FILE)
AUDIT_JSON, AUDIT_HTML, AUDIT_TRIGGERS = "audit.json", "audit.html", "audit_triggers.safetensors"
EVALUATION_FILE, REPORT_JSON, REPORT_HTML = "evaluation.json", "report.json", "report.html"
HEADS, FIGURES = "heads", "figures"
# what was found, measured and reported on a merge
_RESULTS = (AUDIT_JSON, AUDIT_HTML, AUDIT_TRIGGERS, EVALUATION_FILE, REPORT_JSON, REPORT_HTML, INPUTS_FILE)


def copy_artifact(folder: Path, target: Path) -> None:
    """Copy the files of an artefact, and remove those of another one; do nothing if both folders are the same.

    Results of another merge, which was made with other masks, go as well: they would be published as this one's.

    Raises:
        OSError: the target cannot be written.
    """
    if folder.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    old, new = target / MASKS_FILE, folder / MASKS_FILE
    if old.is_file() and not (new.is_file() and filecmp.cmp(old, new, shallow=False)):
        remove_results(target)
    files = [name for name in FILES if (folder / name).is_file()]
    heads = sorted(f"{HEADS}/{file.name}" for file in (folder / HEADS).glob("[!.]*"))
    _remove_all_but(target, {*files, *heads})
    for name in (*files, *heads):
        (target / name).parent.mkdir(exist_ok=True)
        copy(folder / name, target / name)


def remove_results(target: Path) -> None:
    """Remove what was found, measured and reported on the merge in a folder."""
    for name in _RESULTS:
        (target / name).unlink(missing_ok=True)
    for figure in (target / FIGURES).glob("*.png"):
        figure.unlink()


def remove_artifact(target: Path) -> None:
    """Remove the artefact in a folder with its results, where another method's merge replaces the merge."""
    remove_results(target)
    _remove_all_but(target, ())


def _remove_all_but(target: Path, kept: Collection[str]) -> None:
    """Remove an artefact's files and heads other than these, named by their paths in the folder."""
    for name in (*FILES, *(f"{HEADS}/{file.name}" for file in (target / HEADS).glob("[!.]*"))):
        if name not in kept:
            (target / name).unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """Copy a file atomically; a link at `target` is replaced, not followed."""
    with replacing(target) as temporary, open(temporary, "wb") as file, source.open("rb") as original:
        _copy_bytes(file.fileno(), original.fileno())


def _copy_bytes(target: int, source: int) -> None:
    """Copy all bytes of an open file to an empty one, by the kernel where it supports that."""
    copied = 0
    try:
        while hasattr(os, "copy_file_range") and (count := os.copy_file_range(source, target, 1 << 30)):
            copied += count
    except OSError:  # the kernel cannot copy between these two file systems
        if copied:
            raise
    with open(source, "rb", closefd=False) as original, open(target, "wb", closefd=False) as file:
        shutil.copyfileobj(original, file, 1 << 20)  # the bytes that the kernel did not copy


def write_run(folder: Path, plan: Plan, facts: Mapping[str, Any]) -> None:
    """Write `run.json`: facts that differ between runs on equal inputs, and so are not in the masks' metadata."""
    write_atomic(folder / RUN_FILE, json.dumps({**facts, "revisions": revisions_of(plan)}, indent=1))


def revisions_of(plan: Plan) -> dict[str, str | None]:
    """Hub commit by model name, None for a local folder; theta_0 is called `base`."""
    return {model.name: revision_of(model) for model in (plan.base, *plan.models)}


def save_heads(tasks: Iterable[Task], folder: Path) -> None:
    """Write the heads that the base lacks, per task: tensors, and the config of the head's class."""
    for task in tasks:
        if task.head:
            folder.mkdir(exist_ok=True)
            tensors = {name: tensor.contiguous().cpu() for name, tensor in task.head.items()}
            with replacing(folder / f"{task.name}.safetensors") as temporary:
                save_file(tensors, temporary, metadata={"format": "pt"})
            write_atomic(folder / f"{task.name}.json", task.input.config.to_json_string(use_diff=False))
