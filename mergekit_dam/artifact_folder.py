"""The files that learning leaves beside `dam_masks.safetensors`, and a copy of them without locks and checkpoints.

dam_masks.safetensors   masks and coefficients (artifact.py)
triggers.safetensors    triggers that the scan recovered (findings.py)
metrics.jsonl           one flat JSON record per step
run.json                when, where and how long; revisions of the inputs
heads/                  heads that the base lacks, per task: tensors and config
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_dam.artifact import MASKS_FILE
from mergekit_dam.plan import ModelInput, Plan

TRIGGERS_FILE, METRICS_FILE, RUN_FILE = "triggers.safetensors", "metrics.jsonl", "run.json"
FILES = (MASKS_FILE, TRIGGERS_FILE, METRICS_FILE, RUN_FILE)
HEADS = "heads"


def copy_artifact(folder: Path, target: Path) -> None:
    """Copy what is there of it; the same folder is left as it is.

    Raises:
        OSError: the target cannot be written.
    """
    if folder.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (folder / name).is_file():
            shutil.copy2(folder / name, target / name)
    if (folder / HEADS).is_dir():
        shutil.copytree(folder / HEADS, target / HEADS, dirs_exist_ok=True)


def write_run(folder: Path, plan: Plan, facts: Mapping[str, Any]) -> None:
    """`run.json`: what differs between runs on equal inputs, and hence is no part of the masks' metadata."""
    revisions = {model.name: revision_of(model) for model in (plan.base, *plan.models)}
    part = folder / f".{RUN_FILE}.part"
    part.write_text(json.dumps({**facts, "revisions": revisions}, indent=1), encoding="utf-8")
    os.replace(part, folder / RUN_FILE)


def revision_of(model: ModelInput) -> str | None:
    """The commit that a Hub id was resolved to, by the name of its snapshot folder; None for a local directory."""
    return model.path.name if model.path.parent.name == "snapshots" else None
