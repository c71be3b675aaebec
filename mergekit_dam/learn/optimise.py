"""Tasks and models -> masks: the search itself, with its journal, its snapshots and what it leaves behind.

All processes of a run call `optimise` together; the first one writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mergekit_dam.artifact.folder import METRICS_FILE, TRIGGERS_FILE, write_run
from mergekit_dam.artifact.masks_file import MASKS_FILE, LearnedMasks, save
from mergekit_dam.artifact.triggers_file import save_triggers
from mergekit_dam.config import DamConfig
from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.engine.shards import Shards
from mergekit_dam.engine.snapshots import Snapshots
from mergekit_dam.engine.task_vectors import TaskVectors, survey
from mergekit_dam.errors import DamError
from mergekit_dam.io.cache import library_versions
from mergekit_dam.io.files import replacing, write_whole
from mergekit_dam.learn.inversion_search import InversionSearch
from mergekit_dam.learn.journal import Recorder, Tracker, open_journal
from mergekit_dam.learn.paper_search import PaperSearch
from mergekit_dam.learn.students import forget_students, teach_all
from mergekit_dam.merging.checks import warn_about_masks, warn_about_task_vectors
from mergekit_dam.merging.triton_merge import warn_without_kernels
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.plan import Plan
from mergekit_dam.tasks import Task

_OBJECTIVES: dict[str, type[InversionSearch | PaperSearch]] = {"inversion": InversionSearch, "paper": PaperSearch}


def optimise(
    plan: Plan, folder: Path, description: dict[str, Any], inputs: Sequence[Checkpoint], tasks: Sequence[Task],
    device: torch.device, *, shards: Shards, quiet: bool,
) -> None:  # fmt: skip
    """Learn masks and save them, with metrics and heads, into `folder`; goes on where a run was cut short.

    Args:
        plan: what is merged.
        folder: of the artefact, locked by the caller.
        description: what the masks depend on.
        inputs: the models' weights as they were when they were hashed; a change since then is refused at the end.
        tasks: of the plan.
        device: of this process.
        shards: processes that call this together.
        quiet: no progress bar.
    """
    first, config = shards.rank == 0, plan.config
    vectors = TaskVectors(plan)
    found = survey(vectors, shards)
    if first:
        warn_about_task_vectors([model.name for model in plan.models], found.norms)
        warn_without_kernels(device)
    blockwise = shards.size > 1 and config.gather == "block"
    if shards.size > 1 and (blockwise or config.offload != "none"):
        _require_equal_passes(tasks, config)
    snapshots = Snapshots(folder / "run", every=config.snapshot_every, resume=config.resume, shards=shards)
    if first:
        _save_heads(tasks, folder / "heads")
    started = datetime.now(timezone.utc)
    tracker = Tracker(config.tracker if first else None, config.model_dump())
    with open_journal(folder / METRICS_FILE if first else Path(os.devnull), snapshots) as metrics, closing(tracker):
        recorder = Recorder(metrics, tracker, quiet=quiet)
        students = teach_all(tasks, vectors, snapshots.folder, shards=shards, progress=recorder.progress)
        if students is not None and snapshots.facts is None:  # else the record is in the journal
            recorder.track({"phase": "students", **{f"agreement/{k}": v for k, v in students.agreement.items()}})
        changed = found.changed if students is None else survey(students, shards).changed
        model = MergedModel(
            students or vectors, changed, device,
            offload=config.offload, dtype=tasks[0].dtype, shards=shards, blockwise=blockwise,
        )  # fmt: skip
        start = torch.tensor([m.settings.weight for m in plan.models])
        search = _OBJECTIVES[config.objective](
            model, tasks, config, start, track=recorder.track, progress=recorder.progress, snapshots=snapshots
        )
        probabilities, coefficients = search.run()
    metadata = description | {
        "tensors": list(model.mask_names), "seed": config.seed, "versions": library_versions(),
        "norms": list(found.norms), "densities": {n: m.density() for n, m in search.masks.items()},
        "audit": search.audit(), "own_masks": [name for name, mask in search.masks.items() if mask.owners],
    }  # fmt: skip
    if students is not None:
        metadata["students"] = students.agreement
    if first:
        warn_about_masks(probabilities, coefficients)
        for checkpoint in inputs:
            checkpoint.require_unchanged()
        if isinstance(search, InversionSearch):
            save_triggers(folder / TRIGGERS_FILE, search.findings, tasks, search.pools.keys())
        when = {"started": started.isoformat(timespec="seconds"), "seconds": recorder.seconds}
        write_run(folder, plan, when | {"device": str(device), "processes": shards.size})
        taught = () if students is None else students.all()
        save(folder / MASKS_FILE, LearnedMasks(probabilities, coefficients, metadata, students=taught))
        forget_students(snapshots.folder)
    shards.barrier()
    snapshots.clear()


def _require_equal_passes(tasks: Sequence[Task], config: DamConfig) -> None:
    """Blocks that wait for all processes need the same passes in each of them.

    Raises:
        DamError: tasks of different classes or tensors, or the published loop, whose passes differ.
    """
    kinds = {(type(task.module), tuple(task.targets)) for task in tasks}
    if len(kinds) > 1 or config.objective == "paper":
        raise DamError(
            "settings 'gather' and 'offload'",
            expected="for several processes objective inversion, and models of one class with equal tensors",
            got=f"objective {config.objective} and {len(kinds)} kinds of models",
            cure="Leave both out, or learn with num_processes: 1.",
        )  # fmt: skip


def _save_heads(tasks: Iterable[Task], folder: Path) -> None:
    """Heads that the base lacks stay per task: tensors, and the config of the class that holds them."""
    for task in tasks:
        if task.head:
            folder.mkdir(exist_ok=True)
            tensors = {name: tensor.contiguous().cpu() for name, tensor in task.head.items()}
            with replacing(folder / f"{task.name}.safetensors") as temporary:
                save_file(tensors, temporary, metadata={"format": "pt"})
            write_whole(folder / f"{task.name}.json", task.input.config.to_json_string(use_diff=False))
