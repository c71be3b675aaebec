"""Collect the facts of a report as JSON (schema 1), from the files that learning wrote beside the merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mergekit_dam.artifact.folder import METRICS_FILE, REPORT_JSON, RUN_FILE, TRIGGERS_FILE
from mergekit_dam.artifact.masks_file import MASKS_FILE, LearnedMasks, load
from mergekit_dam.artifact.triggers_file import StoredTrigger, load_triggers
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.results import read_measurements
from mergekit_dam.io.untrusted import load_json
from mergekit_dam.publish.audit_page import read_merge_audit
from mergekit_dam.publish.layers import layers_of, own_densities

SCHEMA = 1
_METRICS_BYTES = 1 << 28  # a record has 2 kB, and the longest run 100,000 steps


def report_facts(
    folder: Path, *, seconds: float | None, masks: LearnedMasks | None = None
) -> tuple[dict[str, Any], LearnedMasks, list[StoredTrigger]]:
    """Collect the facts of the merge whose artefact lies in `folder`.

    Args:
        folder: folder of the masks file.
        seconds: wall time of the whole merge, or None if it was not measured.
        masks: masks of this folder, if they were read already.

    Returns:
        The facts, the masks, and the recovered triggers.

    Raises:
        DamError: the masks are missing, or a file is damaged.
    """
    masks = load(folder / MASKS_FILE) if masks is None else masks
    metadata = masks.metadata
    run = read_json(folder / RUN_FILE)
    revisions = run.pop("revisions", {})
    triggers = load_triggers(folder / TRIGGERS_FILE)
    norms = metadata.get("norms", [None] * len(metadata["models"]))
    own: Sequence[float | None] = own_densities(masks) or [None] * len(metadata["models"])
    models = [
        {
            "name": model["name"],
            "model": model["model"],
            "revision": revisions.get(model["name"]),
            "sha256": model["sha256"],
            "task_vector_norm": norm,
            "samples": len(model["samples"]),
            "own_density": kept,
            "settings": model["settings"],
        }
        for model, norm, kept in zip(metadata["models"], norms, own, strict=True)
    ]
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "base": {**metadata["base"], "revision": revisions.get("base")},
        "models": models,
        "settings": metadata["settings"],
        "versions": metadata.get("versions", {}),
        "densities": metadata.get("densities", {}),
        "layers": [asdict(layer) for layer in layers_of(masks)],
        "training": _training(read_metrics(folder / METRICS_FILE)),
        "audit": metadata.get("audit", []),
        "remaining": _remaining(metadata),
        "merge_audit": read_merge_audit(folder.parent),
        "students": metadata.get("students", {}),
        "vaccinated": metadata.get("vaccinated", {}),
        "triggers": [dict(trigger.facts) for trigger in triggers],
        "evaluation": read_measurements(folder),
        "run": run,
    }
    if isinstance(run.get("seconds"), dict):
        run["learning_seconds"] = round(sum(map(float, run["seconds"].values())), 1)
    if seconds is not None:
        facts["run"] = {**run, "wall_seconds": round(seconds, 1)}
    else:
        earlier = read_json(folder / REPORT_JSON).get("run", {})
        facts["run"] = {**run, **{k: v for k, v in earlier.items() if k == "wall_seconds"}}
    return facts, masks, triggers


def _remaining(metadata: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Success of the suspects' recovered triggers on their model and on the merge; None in masks without this entry.

    Raises:
        ValueError, TypeError, KeyError: an entry is no rate.
    """
    if "remaining" not in metadata:
        return None
    entries = [dict(entry) for entry in metadata["remaining"]]
    for entry in entries:
        entry |= {key: _rate(entry[key]) for key in ("before", "after", "control")}
        entry["plain"] = None if entry["plain"] is None else _rate(entry["plain"])
    return entries


def _rate(value: Any) -> float:
    if isinstance(value, bool) or not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{value!r} is no share")
    return float(value)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the records of `metrics.jsonl`, without incomplete lines."""
    records: list[dict[str, Any]] = []
    if not file.is_file():
        return records
    if file.stat().st_size > _METRICS_BYTES:
        raise DamError(
            f"file {file}",
            expected=f"at most {_METRICS_BYTES} bytes",
            got=str(file.stat().st_size),
            cure="Remove it: the report is then written without its curves.",
        )
    for line in file.read_text("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing."""
    return load_json(file) if file.is_file() else {}


def _training(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Number of steps, and the first and last losses, by phase."""
    phases: dict[str, Any] = {}
    for record in records:
        phase = record.get("phase")
        if phase == "scan" or "loss" not in record:
            continue
        losses = {key: value for key, value in record.items() if key.startswith("loss")}
        entry = phases.setdefault(str(phase), {"steps": 0, "first": losses})
        entry["steps"] += 1
        entry["last"] = losses
    return phases
