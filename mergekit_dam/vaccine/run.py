"""Vaccinate all models of a plan, one after the other, each into a model directory."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_dam.engine.device import device_of
from mergekit_dam.engine.task_vectors import TaskVectors
from mergekit_dam.errors import DamError
from mergekit_dam.io.cache import library_versions
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.plan import ModelInput, Plan, revision_of
from mergekit_dam.tasks import Task, family_of
from mergekit_dam.tasks.base import Progress
from mergekit_dam.vaccine.adapter import read_adapter
from mergekit_dam.vaccine.behaviours import BEHAVIOURS
from mergekit_dam.vaccine.clean import Vaccination, identity_of, vaccinate
from mergekit_dam.vaccine.folder import WORK, claimed, finished, lora_of, require_free, write_cleaned
from mergekit_dam.vaccine.settings import VaccineSettings, resolved
from mergekit_dam.vaccine.triggers import kinds_of, require_known

SCHEMA = 1
_LARGE = 1_000_000_000  # parameters from which a model computes in bfloat16 on an accelerator, block by block


@dataclass(frozen=True)
class Cleaned:
    """A model directory that was written, with the content of its vaccine.json."""

    name: str
    folder: Path
    facts: Mapping[str, Any]


def folders_of(plan: Plan, out: Path) -> list[Path]:
    """The output folder of each model: `out` itself for a single model, else a folder of its name in it."""
    return [out] if len(plan.models) == 1 else [out / model.name for model in plan.models]


def require_possible(plan: Plan, out: Path, *, adapter: bool, settings: VaccineSettings) -> None:
    """Refuse models that cannot be cleaned and outputs that cannot be written, before a weight is read.

    Raises:
        DamError: an unsupported family, or an output that is not ours to replace.
    """
    family_of(plan)
    require_known(settings.leave_out, BEHAVIOURS)
    inputs = {"the base": plan.base.path, **{f"model {model.name}": model.path for model in plan.models}}
    for folder in folders_of(plan, out):
        require_free(folder, inputs)
    if adapter and settings.start == "base":
        raise DamError(
            "setting 'start'",
            expected="model, where an adapter is written",
            got="base",
            cure="Leave --adapter or --start out.",
        )
    for model in plan.models if adapter else ():
        if settings.lora_rank == 0:
            raise _without_loras(model.name)
        if (lora := lora_of(model)) is not None:
            read_adapter(lora)


def _without_loras(name: str) -> DamError:
    return DamError(
        f"an adapter for {name}",
        expected="training by LoRAs",
        got="training of all weights",
        cure="Set lora_rank, e.g. to 8.",
    )


def clean_models(
    plan: Plan, out: Path, settings: VaccineSettings, *, progress: Progress, adapter: bool = False, resume: bool = True
) -> list[Cleaned]:
    """Clean every model of a plan; models that an earlier run cleaned with the same inputs stay.

    Args:
        plan: one model or more.
        out: see `folders_of`.
        settings: of every model.
        progress: wraps steps in a progress bar with a title.
        adapter: write LoRAs on the models instead of models.
        resume: whether snapshots of an interrupted run, and finished models, are used.

    Raises:
        DamError: see `require_possible` and `vaccinate`.
    """
    require_possible(plan, out, adapter=adapter, settings=settings)
    found = []
    for index, folder in enumerate(folders_of(plan, out)):
        task = _task(plan, index, settings, adapter=adapter)
        with claimed(folder):
            of_start = Checkpoint.open(plan.base.path).digest() if settings.start == "base" else ""
            identity = identity_of(task, resolved(settings, task), of_start)
            facts = finished(folder, identity, adapter=adapter) if resume else None
            if facts is None:
                start = _base_weights(plan, task) if of_start else None
                result = vaccinate(
                    task,
                    settings,
                    progress=progress,
                    start=start,
                    folder=folder / WORK,
                    resume=resume,
                    identity=of_start,
                )
                facts = _facts(plan, plan.models[index], task, result.facts)
                # read only, and one tensor at a time: those of LoRAs are computed on access
                weights = result.weights if start is None else ChainMap(result.weights, start)  # type: ignore[arg-type]
                write_cleaned(folder, task, weights, facts, adapter=adapter)
            else:
                shutil.rmtree(folder / WORK, ignore_errors=True)
        found.append(Cleaned(task.name, folder, facts))
    return found


def expected(
    plan: Plan, out: Path, settings: VaccineSettings, *, adapter: bool = False
) -> tuple[list[dict[str, Any]], float]:
    """Estimate what would be done with each model, and its seconds, from a few steps that are measured.

    Returns:
        Facts per model, and seconds in all.

    Raises:
        DamError: see `clean_models`.
    """
    require_possible(plan, out, adapter=adapter, settings=settings)
    entries: list[dict[str, Any]] = []
    for index, folder in enumerate(folders_of(plan, out)):
        task = _task(plan, index, settings, adapter=adapter)
        whole = resolved(settings, task)
        begun = time.perf_counter()
        trial = Vaccination(task, whole, task.own_weights(), task.own_weights(), lambda steps, title: steps)
        prepared = time.perf_counter() - begun
        entries.append(
            {
                "name": task.name,
                "output": str(folder),
                "family": type(task).__name__,
                "samples": task.num_samples,
                "trained parameters": sum(p.numel() for p in trial.trained.trained.values()),
                "seconds": float(f"{prepared + trial.seconds_of_all():.2g}"),
                "settings": whole.model_dump(mode="json"),
            }
        )
    return entries, sum(entry["seconds"] for entry in entries)


def _base_weights(plan: Plan, task: Task) -> dict[str, Tensor]:
    """The base's weights by output name, of all that the model has."""
    vectors = TaskVectors(plan)
    return {name: vectors.base(name).to(task.device) for name in task.sources}


def _task(plan: Plan, index: int, settings: VaccineSettings, *, adapter: bool) -> Task:
    """Make one model's task; a large model computes in bfloat16 on an accelerator and keeps only the blocks' inputs.

    Raises:
        DamError: data or settings that do not fit it.
    """
    config, device = plan.config, device_of(plan.config.device)
    size = sum(math.prod(spec.shape) for spec in plan.tensors)
    if size >= _LARGE:
        given = config.model_fields_set
        changes: dict[str, Any] = {} if "gradient_checkpointing" in given else {"gradient_checkpointing": True}
        if "compute_dtype" not in given and device.type != "cpu":
            changes["compute_dtype"] = "bfloat16"
        plan = dataclasses.replace(plan, config=config.model_copy(update=changes))
    task = family_of(plan)(plan, index, device)
    kinds_of(task, settings.leave_out)
    if adapter and not resolved(settings, task).lora_rank:
        raise _without_loras(task.name)
    return task


def _facts(plan: Plan, model: ModelInput, task: Task, found: Mapping[str, Any]) -> dict[str, Any]:
    """The content of vaccine.json: no path of this machine is in it."""
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "name": task.name,
        "model": {"sha256": task.checkpoint.digest(), "revision": revision_of(model)},
        "calibration": list(task.sample_digests),
        **found,
        "versions": library_versions(),
        "device": str(task.device.type),
        "dtype": str(task.dtype).removeprefix("torch."),
        "max_length": plan.config.max_length,
    }
