"""Plan -> masks: check everything, look into the cache, else learn, here or in worker processes, and save."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from mergekit_dam.artifact.folder import METRICS_FILE, TRIGGERS_FILE, save_heads, write_run
from mergekit_dam.artifact.masks_file import MASKS_FILE, LearnedMasks, describe, load, save
from mergekit_dam.artifact.match import load_cached, verify
from mergekit_dam.artifact.relabel import relabel
from mergekit_dam.artifact.scan_file import StoredScan
from mergekit_dam.artifact.triggers_file import save_triggers
from mergekit_dam.config import DamConfig
from mergekit_dam.engine.device import CPU, device_kind, device_of
from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.engine.processes import Job, run_workers
from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.engine.snapshots import Snapshots
from mergekit_dam.engine.task_vectors import TaskVectors, survey
from mergekit_dam.errors import DamError, Interrupted
from mergekit_dam.io.cache import cache_folder, library_versions
from mergekit_dam.io.files import require_own
from mergekit_dam.learn.journal import Recorder, open_journal
from mergekit_dam.learn.objectives import search_of
from mergekit_dam.learn.scanned_search import ScannedSearch
from mergekit_dam.learn.stand_ins import forget_stand_ins, stand_ins
from mergekit_dam.learn.window_search import FOLDER as WINDOWS
from mergekit_dam.learn.window_search import WindowSearch
from mergekit_dam.learn.window_size import window_warning, with_window
from mergekit_dam.merging.checks import warn_about_masks, warn_about_task_vectors
from mergekit_dam.merging.triton_merge import warn_without_kernels
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.plan import Plan
from mergekit_dam.tasks import Task, build_tasks
from mergekit_dam.tasks.content import content_key

LOG = logging.getLogger(__name__)


def find_or_learn(
    plan: Plan, *, quiet: bool = False, shards: Shards = ALONE, device: torch.device | None = None
) -> tuple[Path, LearnedMasks]:
    """Masks for a plan: given ones verified, cached ones loaded, or new ones learned.

    Args:
        plan: what is merged.
        quiet: no progress bar.
        shards: the processes that call this together (`accelerate launch`); alone, workers are started if the
            setting `num_processes` asks for them.
        device: of this process; None: as the setting `device` says.

    Returns:
        The folder of the artefact (masks, heads, metrics.jsonl) and the masks.

    Raises:
        DamError: anything wrong with models, data or settings, before the first step; or a worker that failed.
    """
    first = shards.rank == 0
    checkpoints = {model.name: Checkpoint.open(model.path) for model in (plan.base, *plan.models)} if first else {}
    digests = shards.all_gather_dict({name: c.digest() for name, c in checkpoints.items()})
    if plan.config.masks is not None:
        path = Path(plan.config.masks).expanduser()
        masks = load(path)
        verify(masks, plan, digests, path=path)
        _warn(masks)
        return path.parent, masks
    count = num_processes(plan.config) if shards.size == 1 else 1
    # a parent of workers only reads the data: it must not open the accelerators that they will use
    place = CPU if count > 1 else device or device_of(plan.config.device)
    chosen = with_window(plan, device_kind(plan.config.device) if count > 1 else place, workers=count, shards=shards)
    if first and chosen.config.window not in ("all", plan.config.window):
        LOG.warning("dam: %s", window_warning(chosen))
    plan = chosen
    tasks = build_tasks(plan, place)
    description = describe(plan, digests, {task.name: list(task.sample_digests) for task in tasks})
    folder = cache_folder() / content_key(plan, tasks, digests)
    if first:
        _make(folder)
    # a second run on the same inputs waits and then finds the masks
    with FileLock(folder / ".lock") if first else nullcontext():
        cached = load_cached(folder / MASKS_FILE, plan, digests) if first else None
        if shards.all_gather_dict({"there": cached is not None} if first else {})["there"]:
            masks = cached or load(folder / MASKS_FILE)
            if first:
                masks = relabel(folder, masks, description, plan)
                if not quiet:
                    LOG.warning("dam: masks from the cache %s; nothing is learned", folder)
                _warn(masks)
            return folder, masks
        inputs = tuple(checkpoints.values())
        try:
            if count > 1:
                run_workers(Job(plan, folder, description, inputs, quiet), count)
            else:
                optimise(plan, folder, description, inputs, tasks, place, shards=shards, quiet=quiet)
        except KeyboardInterrupt as stop:
            raise Interrupted(_how_to_go_on(folder, plan.config)) from stop
        return folder, load(folder / MASKS_FILE)


def _how_to_go_on(folder: Path, config: DamConfig) -> str:
    """After an interruption, half a sentence for the user."""
    facts = None
    if config.constants.resume:
        with suppress(DamError):  # the next run says what is wrong with it
            facts = Snapshots(folder / "run", every=config.constants.snapshot_every, resume=True).facts
    if facts is None:
        return "the same command starts over (no snapshot was due yet)" if config.constants.resume else _OVER
    unit = "model" if facts["phase"] == "scan" else "step"
    return f"the same command goes on from {unit} {facts['done']} of the {facts['phase']}"


_OVER = "the same command starts over, since `resume` is off"


def _warn(masks: LearnedMasks) -> None:
    for line in masks.faults:
        LOG.warning("dam: %s", line)


def num_processes(config: DamConfig) -> int:
    """Processes to learn with: as set, else one per accelerator, and one on the CPU."""
    if config.num_processes is not None:
        return config.num_processes
    usable = config.device == "auto" and torch.accelerator.is_available()
    return max(1, torch.accelerator.device_count()) if usable else 1


def _make(folder: Path) -> None:
    """The folder of a cache entry; where others can write to the cache (/tmp), theirs is not taken for ours."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o775, exist_ok=True)
    except OSError as error:
        raise DamError(
            f"cache {folder}",
            expected="a folder that can be written",
            got=str(error),
            cure="Set MERGEKIT_DAM_CACHE to one.",
        ) from error
    require_own(folder, "Masks of others are not used unasked: remove it, or set MERGEKIT_DAM_CACHE to another folder.")


def optimise(
    plan: Plan,
    folder: Path,
    description: dict[str, Any],
    inputs: Sequence[Checkpoint],
    tasks: Sequence[Task],
    device: torch.device,
    *,
    shards: Shards,
    quiet: bool,
) -> None:
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
    snapshots = Snapshots(
        folder / "run", every=config.constants.snapshot_every, resume=config.constants.resume, shards=shards
    )
    if first:
        save_heads(tasks, folder / "heads")
    with open_journal(folder / METRICS_FILE if first else Path(os.devnull), snapshots) as metrics:
        recorder = Recorder(metrics, quiet=quiet, snapshots=snapshots)
        instead = stand_ins(tasks, vectors, snapshots.folder, shards=shards, progress=recorder.progress)
        if instead is not None and snapshots.facts is None:  # else the record is in the journal
            recorder.track({"phase": "stand-ins", **{f"agreement/{k}": v for k, v in instead.agreement.items()}})
        recorder.seconds.update(instead.seconds if instead is not None else {})
        changed = found.changed if instead is None else survey(instead, shards).changed
        kind = search_of(config)
        model = MergedModel(
            instead or vectors,
            changed,
            device,
            dtype=tasks[0].dtype,
            shards=shards,
            lazy=kind is WindowSearch,
        )
        start = torch.tensor([m.settings.weight for m in plan.models])
        search = kind(
            model,
            tasks,
            config,
            start,
            track=recorder.track,
            progress=recorder.progress,
            snapshots=snapshots,
            known=StoredScan(plan, tasks, _digests_in(description), recorder.seconds, quiet=quiet),
        )
        probabilities, coefficients = search.run()
        read = shards.all_gather_dict({shards.rank: model.vectors.bytes_read})
        remaining = search.remaining()
    metadata = description | {
        "tensors": list(model.mask_names),
        "seed": config.seed,
        "versions": library_versions(),
        "norms": list(found.norms),
        "audit": search.audit(),
        "remaining": remaining,
        **search.facts_of_masks(),
    }
    if instead is not None:
        told = {"students": instead.agreement, "vaccinated": instead.vaccine}
        metadata |= {key: value for key, value in told.items() if value}
    shards.barrier()  # what others still read of the run is removed below
    if first:
        warn_about_masks(probabilities, coefficients)
        for checkpoint in inputs:
            checkpoint.require_unchanged()
        if isinstance(search, ScannedSearch):
            save_triggers(folder / TRIGGERS_FILE, search.findings, tasks, search.trigger_pool.keys())
        when = {"started": recorder.started, "seconds": recorder.seconds}
        write_run(
            folder, plan, when | {"device": str(device), "processes": shards.size, "bytes_read": list(read.values())}
        )
        made = () if instead is None else instead.all()
        save(folder / MASKS_FILE, LearnedMasks(probabilities, coefficients, metadata, stand_ins=made))
        forget_stand_ins(snapshots.folder)
        shutil.rmtree(snapshots.folder / WINDOWS, ignore_errors=True)
    shards.barrier()
    snapshots.clear()


def _digests_in(description: Mapping[str, Any]) -> dict[str, str]:
    """The weights' content hashes that a description holds, by model name."""
    return {"base": description["base"]["sha256"], **{m["name"]: m["sha256"] for m in description["models"]}}
