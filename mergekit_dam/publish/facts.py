"""What a report says, as JSON (schema 1), from the files that learning left beside the merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mergekit_dam.artifact.folder import METRICS_FILE, RUN_FILE, TRIGGERS_FILE
from mergekit_dam.artifact.masks_file import MASKS_FILE, LearnedMasks, load
from mergekit_dam.artifact.triggers_file import StoredTrigger, load_triggers
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.results import read_measurements
from mergekit_dam.io.untrusted import load_json
from mergekit_dam.publish.layers import layers_of, own_densities

SCHEMA = 1
_METRICS_BYTES = 1 << 28  # a record has 2 kB, and the longest run 100,000 steps


def report_facts(
    folder: Path, *, seconds: float | None, masks: LearnedMasks | None = None
) -> tuple[dict[str, Any], LearnedMasks, list[StoredTrigger]]:
    """Facts of the merge whose artefact lies in `folder`.

    Args:
        seconds: wall time of the whole merge, where it was measured.
        masks: of this folder, where they were read already.

    Raises:
        DamError: no masks there, or a damaged file.
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
        "students": metadata.get("students", {}),
        "vaccinated": metadata.get("vaccinated", {}),
        "triggers": [dict(one.facts) for one in triggers],
        "evaluation": read_measurements(folder),
        "run": run,
    }
    if isinstance(run.get("seconds"), dict):
        run["learning_seconds"] = round(sum(map(float, run["seconds"].values())), 1)
    if seconds is not None:
        facts["run"] = {**run, "wall_seconds": round(seconds, 1)}
    else:
        earlier = read_json(folder / "report.json").get("run", {})
        facts["run"] = {**run, **{k: v for k, v in earlier.items() if k == "wall_seconds"}}
    return facts, masks, triggers


def _remaining(metadata: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """What recovered triggers of suspects do to their model and to the merge; None in masks that do not say it.

    Raises:
        ValueError, TypeError, KeyError: rates that are none.
    """
    if "remaining" not in metadata:
        return None
    found = [dict(one) for one in metadata["remaining"]]
    for one in found:
        one |= {key: _rate(one[key]) for key in ("before", "after", "control")}
        one["plain"] = None if one["plain"] is None else _rate(one["plain"])
    return found


def _rate(value: Any) -> float:
    if isinstance(value, bool) or not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{value!r} is no share")
    return float(value)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Records of `metrics.jsonl`; a last line that was cut off is left out."""
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
    """A JSON object; empty if there is no such file."""
    return load_json(file) if file.is_file() else {}


def _training(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Steps, and the first and last losses, by phase."""
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
