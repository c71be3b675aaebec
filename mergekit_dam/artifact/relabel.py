"""Names of a recipe for what was learned on the same content under other names.

The cache finds masks by content and position. Names of models stand in the metadata of the masks and of the triggers,
in the journal, in run.json, and in the names of the heads' files: they become those of the recipe at hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_dam.artifact.folder import HEADS, METRICS_FILE, RUN_FILE, TRIGGERS_FILE, revisions_of
from mergekit_dam.artifact.masks_file import MASKS_FILE, LearnedMasks, save
from mergekit_dam.artifact.triggers_file import rename_entries
from mergekit_dam.io.files import write_atomic
from mergekit_dam.models.plan import Plan

_LABELS = ("model", "task")  # entries whose value is the name of a model
_PREFIXES = ("loss/perf/", "loss/safe/", "agreement/", "stand-in of ")  # of keys that end in one


def relabel(folder: Path, masks: LearnedMasks, description: Mapping[str, Any], plan: Plan) -> LearnedMasks:
    """Rename the models in an artefact, where it calls them otherwise; the caller holds the folder's lock.

    Args:
        folder: of the artefact that `masks` were read from.
        description: what masks of this recipe say of their inputs (`describe`).
        plan: of this recipe.

    Returns:
        The masks with the recipe's names.
    """
    if {key: masks.metadata.get(key) for key in description} == json.loads(json.dumps(description)):
        return masks
    pairs = zip(masks.metadata["models"], description["models"], strict=True)
    names = {then["name"]: now["name"] for then, now in pairs}
    _rename_heads(folder / HEADS, names)
    rename_entries(folder / TRIGGERS_FILE, lambda entries: _renamed(entries, names))
    journal = folder / METRICS_FILE
    if journal.is_file():
        records = [_renamed(json.loads(line), names) for line in journal.read_text("utf-8").splitlines()]
        write_atomic(journal, "".join(json.dumps(record) + "\n" for record in records))
    if (folder / RUN_FILE).is_file():
        facts = _renamed(json.loads((folder / RUN_FILE).read_text("utf-8")), names)
        write_atomic(folder / RUN_FILE, json.dumps(facts | {"revisions": revisions_of(plan)}, indent=1))
    metadata = {**masks.metadata, **description}
    metadata |= {key: _renamed(metadata[key], names) for key in ("audit", "remaining") if key in metadata}
    for key in {"students", "vaccinated"} & metadata.keys():
        metadata[key] = {names[name]: value for name, value in metadata[key].items()}
    named = replace(masks, metadata=metadata)
    save(folder / MASKS_FILE, named)  # last: a run that is cut short before it renames again
    return named


def _renamed(found: Any, names: Mapping[str, str]) -> Any:
    """A JSON value with other names in its keys and labels."""
    if isinstance(found, list):
        return [_renamed(value, names) for value in found]
    if not isinstance(found, Mapping):
        return found
    changed = {}
    for key, value in found.items():
        prefix = next((one for one in _PREFIXES if key.startswith(one)), key)
        last = key.removeprefix(prefix)
        label = isinstance(value, str) and key in _LABELS
        changed[prefix + names.get(last, last)] = names.get(value, value) if label else _renamed(value, names)
    return changed


def _rename_heads(folder: Path, names: Mapping[str, str]) -> None:
    """Names may change places: every file first gets one that no model has."""
    files = [(file, names[file.stem]) for file in sorted(folder.glob("[!.]*")) if file.stem in names]
    moved = [(file.rename(file.with_name(f".{file.name}.moved")), f"{name}{file.suffix}") for file, name in files]
    for file, name in moved:
        file.replace(folder / name)
