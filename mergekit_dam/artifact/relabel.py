"""Rename the models in an artefact that was learned on the same content under other names.

The cache finds masks by content and position. Names of models are in the metadata of masks and triggers, in the
journal, in run.json, and in the names of the heads' files. They become the names of the current recipe.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_dam.artifact.folder import HEADS, METRICS_FILE, RUN_FILE, TRIGGERS_FILE, revisions_of, save_heads
from mergekit_dam.artifact.masks_file import MASKS_FILE, LearnedMasks, save
from mergekit_dam.artifact.triggers_file import rename_entries
from mergekit_dam.io.files import write_atomic
from mergekit_dam.models.plan import Plan
from mergekit_dam.tasks import Task

_LABELS = ("model", "task")  # entries whose value is the name of a model
_PREFIXES = ("loss/perf/", "loss/safe/", "agreement/", "stand-in of ")  # of keys that end in the name of a model


def relabel(
    folder: Path, masks: LearnedMasks, description: Mapping[str, Any], plan: Plan, tasks: Sequence[Task]
) -> LearnedMasks:
    """Give the models in an artefact the names of this recipe; the caller holds the folder's lock.

    Args:
        folder: folder of the artefact that `masks` were read from.
        description: description of this recipe's inputs (`describe`).
        plan: plan of this recipe.
        tasks: tasks of this plan, whose heads are written anew.

    Returns:
        The masks with the recipe's names.
    """
    if {key: masks.metadata.get(key) for key in description} == json.loads(json.dumps(description)):
        return masks
    pairs = zip(masks.metadata["models"], description["models"], strict=True)
    names = {old["name"]: new["name"] for old, new in pairs}
    shutil.rmtree(folder / HEADS, ignore_errors=True)  # renamed files could be lost, or renamed twice, by a kill
    save_heads(tasks, folder / HEADS)
    rename_entries(folder / TRIGGERS_FILE, lambda entries: _rename(entries, names))
    journal = folder / METRICS_FILE
    if journal.is_file():
        records = [_rename(json.loads(line), names) for line in journal.read_text("utf-8").splitlines()]
        write_atomic(journal, "".join(json.dumps(record) + "\n" for record in records))
    if (folder / RUN_FILE).is_file():
        facts = _rename(json.loads((folder / RUN_FILE).read_text("utf-8")), names)
        write_atomic(folder / RUN_FILE, json.dumps(facts | {"revisions": revisions_of(plan)}, indent=1))
    metadata = {**masks.metadata, **description}
    metadata |= {key: _rename(metadata[key], names) for key in ("audit", "remaining") if key in metadata}
    for key in {"students", "vaccinated"} & metadata.keys():
        metadata[key] = {names[name]: value for name, value in metadata[key].items()}
    relabelled = replace(masks, metadata=metadata)
    save(folder / MASKS_FILE, relabelled)  # last, so that a run that was interrupted before this renames again
    return relabelled


def _rename(values: Any, names: Mapping[str, str]) -> Any:
    """Replace names of models in the keys and labels of a JSON value."""
    if isinstance(values, list):
        return [_rename(value, names) for value in values]
    if not isinstance(values, Mapping):
        return values
    renamed = {}
    for key, value in values.items():
        prefix = next((p for p in _PREFIXES if key.startswith(p)), key)
        last = key.removeprefix(prefix)
        is_label = isinstance(value, str) and key in _LABELS
        renamed[prefix + names.get(last, last)] = names.get(value, value) if is_label else _rename(value, names)
    return renamed
