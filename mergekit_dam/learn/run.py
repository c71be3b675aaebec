"""Learn the masks of a plan, or take them from a file or the cache: resolve, prepare, search, save."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

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
from mergekit_dam.engine.task_vectors import StandIns, TaskVectors, survey
from mergekit_dam.errors import DamError, Interrupted
from mergekit_dam.io.cache import cache_folder, library_versions
from mergekit_dam.io.files import require_own
from mergekit_dam.learn.journal import Recorder, open_journal
from mergekit_dam.learn.masks import ProbabilityBytes
from mergekit_dam.learn.objectives import search_class
from mergekit_dam.learn.scanned_search import ScannedSearch
from mergekit_dam.learn.search import MaskSearch
from mergekit_dam.learn.stand_ins import make_stand_ins, remove_stand_ins, teaches_suspects
from mergekit_dam.learn.window_search import FOLDER as WINDOWS
from mergekit_dam.learn.window_search import WindowSearch
from mergekit_dam.learn.window_size import window_warning, with_window
from mergekit_dam.merging.checks import warn_about_masks, warn_about_task_vectors
from mergekit_dam.merging.triton_merge import warn_without_kernels
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.plan import Plan
from mergekit_dam.tasks import Task, build_tasks
from mergekit_dam.tasks.content import content_key
from mergekit_dam.vaccine.triggers import code_of_kinds

LOG = logging.getLogger(__name__)


def find_or_learn(
    plan: Plan,
    *,
    quiet: bool = False,
    shards: Shards = ALONE,
    device: torch.device | None = None,
    copy: Callable[[Path], None] | None = None,
) -> tuple[Path, LearnedMasks]:
    """Return the masks of a plan: the given masks, verified; else masks from the cache; else newly learned masks.

    Args:
        plan: what is merged.
        quiet: no progress bar.
        shards: the processes that call this together (`accelerate launch`); a single process starts workers if the
            setting `num_processes` says so.
        device: device of this process; None: the setting `device`.
        copy: called by the first process with the artefact's folder, before another run can rename the models in it.

    Returns:
        The folder of the artefact (masks, heads, metrics.jsonl) and the masks.

    Raises:
        DamError: a fault in models, data or settings, before the first step; or a worker that failed.
    """
    first = shards.rank == 0
    checkpoints = {model.name: Checkpoint.open(model.path) for model in (plan.base, *plan.models)} if first else {}
    digests = shards.all_gather_dict({name: checkpoint.digest() for name, checkpoint in checkpoints.items()})
    if plan.config.masks is not None:
        given = _given_masks(plan, Path(plan.config.masks).expanduser(), digests)
        if first and copy is not None:
            copy(given[0])
        return given
    workers = num_processes(plan.config) if shards.size == 1 else 1
    # a parent of workers only reads the data: it must not open the accelerators that the workers will use
    place = CPU if workers > 1 else device or device_of(plan.config.device)
    plan = _with_window(plan, device_kind(plan.config.device) if workers > 1 else place, workers, shards)
    tasks = build_tasks(plan, place)
    description = describe(plan, digests, {task.name: list(task.sample_digests) for task in tasks})
    folder = (plan.cache or cache_folder()) / content_key(plan, tasks, digests, code=code_of_kinds())
    if first:
        _make_entry(folder)
    # a second run on the same inputs waits for this lock, and then finds the masks
    with FileLock(folder / ".lock") if first else nullcontext():
        masks = _cached_masks(plan, folder, description, digests, tasks, shards=shards, quiet=quiet)
        if masks is None:
            inputs = tuple(checkpoints.values())
            try:
                if workers > 1:
                    run_workers(Job(plan, folder, description, inputs, quiet), workers)
                else:
                    optimise(plan, folder, description, inputs, tasks, place, shards=shards, quiet=quiet)
            except KeyboardInterrupt as stop:
                raise Interrupted(_resume_hint(folder, plan.config)) from stop
            masks = load(folder / MASKS_FILE)
        if first and copy is not None:
            copy(folder)
        return folder, masks


def _given_masks(plan: Plan, path: Path, digests: Mapping[str, str]) -> tuple[Path, LearnedMasks]:
    """Load the masks of the setting `masks`, and verify that they fit the plan."""
    masks = load(path)
    verify(masks, plan, digests, path=path)
    _warn(masks)
    return path.parent, masks


def _with_window(plan: Plan, device: torch.device, workers: int, shards: Shards) -> Plan:
    """Choose the window of the plan, and warn if it is not the whole model by choice of `auto`."""
    chosen = with_window(plan, device, workers=workers, shards=shards)
    if shards.rank == 0 and chosen.config.window not in ("all", plan.config.window):
        LOG.warning("dam: %s", window_warning(chosen))
    return chosen


def _cached_masks(
    plan: Plan,
    folder: Path,
    description: dict[str, Any],
    digests: Mapping[str, str],
    tasks: Sequence[Task],
    *,
    shards: Shards,
    quiet: bool,
) -> LearnedMasks | None:
    """Load the masks in a cache entry, with this plan's names; None if the entry has none."""
    first = shards.rank == 0
    cached = load_cached(folder / MASKS_FILE, plan, digests) if first else None
    if not shards.all_gather_dict({"there": cached is not None} if first else {})["there"]:
        return None
    masks = cached or load(folder / MASKS_FILE)
    if first:
        shutil.rmtree(folder / "run", ignore_errors=True)  # of a run that was killed when its masks were finished
        masks = relabel(folder, masks, description, plan, tasks)
        if not quiet:
            LOG.warning("dam: masks from the cache %s; nothing is learned", folder)
        _warn(masks)
    return masks


def _resume_hint(folder: Path, config: DamConfig) -> str:
    """Say how to resume an interrupted run: half a sentence for `Interrupted`."""
    if not config.constants.resume:
        return "the same command starts over, since `resume` is off"
    facts = None
    with suppress(DamError):  # the next run reports a damaged snapshot
        facts = Snapshots(folder / "run", every=config.constants.snapshot_every, resume=True).facts
    if facts is None:
        return "the same command starts over (no snapshot was due yet)"
    unit = "model" if facts["phase"] == "scan" else "step"
    return f"the same command goes on from {unit} {facts['done']} of the {facts['phase']}"


def _warn(masks: LearnedMasks) -> None:
    """Log the faults that were recorded with the masks."""
    for line in masks.faults:
        LOG.warning("dam: %s", line)


def num_processes(config: DamConfig) -> int:
    """Return the number of processes that learn: the setting, else one per accelerator, and one on the CPU."""
    if config.num_processes is not None:
        return config.num_processes
    usable = config.device == "auto" and torch.accelerator.is_available()
    return max(1, torch.accelerator.device_count()) if usable else 1


def _make_entry(folder: Path) -> None:
    """Make the folder of a cache entry; refuse a folder of another user, e.g. in a cache in /tmp."""
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
    """Learn masks and save them, with metrics and heads, into `folder`; resume an interrupted run.

    Args:
        plan: what is merged.
        folder: folder of the artefact, locked by the caller.
        description: all that the masks depend on.
        inputs: the models' weights when they were hashed; weights that changed since then are refused at the end.
        tasks: tasks of the plan.
        device: device of this process.
        shards: processes that call this together.
        quiet: no progress bar.
    """
    first, constants = shards.rank == 0, plan.config.constants
    vectors = TaskVectors(plan)
    surveyed = survey(vectors, shards)
    if first:
        warn_about_task_vectors([model.name for model in plan.models], surveyed.norms)
        warn_without_kernels(device)
    snapshots = Snapshots(folder / "run", every=constants.snapshot_every, resume=constants.resume, shards=shards)
    if first:
        save_heads(tasks, folder / "heads")
    with open_journal(folder / METRICS_FILE if first else Path(os.devnull), snapshots) as metrics:
        recorder = Recorder(metrics, quiet=quiet, snapshots=snapshots)
        stand_ins = make_stand_ins(tasks, vectors, snapshots.folder, shards=shards, progress=recorder.progress)
        changed = surveyed.changed
        if stand_ins is not None:
            if snapshots.facts is None:  # a resumed run has this record in its journal
                recorder.track({"phase": "stand-ins", **{f"agreement/{k}": v for k, v in stand_ins.agreement.items()}})
            recorder.seconds.update(stand_ins.seconds)
            changed = survey(stand_ins, shards).changed
        kind = search_class(plan.config)

        def merged(sources: TaskVectors) -> MergedModel:
            lazy = kind is WindowSearch
            return MergedModel(sources, changed, device, dtype=tasks[0].dtype, shards=shards, lazy=lazy)

        def teach(suspects: Collection[int]) -> MergedModel:
            nonlocal stand_ins
            stand_ins = make_stand_ins(
                tasks, vectors, snapshots.folder, shards=shards, progress=recorder.progress, suspects=suspects
            )
            assert stand_ins is not None
            recorder.seconds.update(stand_ins.seconds)
            return merged(stand_ins)

        search = kind(
            merged(stand_ins or vectors),
            tasks,
            plan.config,
            torch.tensor([model.settings.weight for model in plan.models]),
            track=recorder.track,
            progress=recorder.progress,
            snapshots=snapshots,
            known=StoredScan(plan, tasks, _digests_in(description), recorder.seconds, quiet=quiet),
            teach=teach if teaches_suspects(tasks, plan.config) else None,
        )
        probabilities, coefficients = search.run()
        bytes_read = shards.all_gather_dict({shards.rank: search.model.vectors.bytes_read})
        remaining = search.remaining()
    metadata = description | _results(search, surveyed.norms, remaining, stand_ins)
    shards.barrier()  # other processes may still read files of the run, which are removed below
    if first:
        times = {"started": recorder.started, "seconds": recorder.seconds}
        run = times | {"device": str(device), "processes": shards.size, "bytes_read": list(bytes_read.values())}
        _save(search, folder, plan, inputs, (probabilities, coefficients), metadata, stand_ins, run)
        remove_stand_ins(snapshots.folder)
        shutil.rmtree(snapshots.folder / WINDOWS, ignore_errors=True)
    shards.barrier()
    snapshots.clear()


def _results(
    search: MaskSearch, norms: Sequence[float], remaining: list[dict[str, Any]], stand_ins: StandIns | None
) -> dict[str, Any]:
    """Return what the metadata of the masks file say about the result of a search."""
    results = {
        "tensors": list(search.model.mask_names),
        "seed": search.config.seed,
        "versions": library_versions(),
        "norms": list(norms),
        "audit": search.audit(),
        "remaining": remaining,
        **search.facts_of_masks(),
    }
    if stand_ins is not None:
        by_model = {"students": stand_ins.agreement, "vaccinated": stand_ins.vaccine}
        results |= {key: value for key, value in by_model.items() if value}
    return results


def _save(
    search: MaskSearch,
    folder: Path,
    plan: Plan,
    inputs: Sequence[Checkpoint],
    learned: tuple[ProbabilityBytes, Tensor],
    metadata: dict[str, Any],
    stand_ins: StandIns | None,
    run: dict[str, Any],
) -> None:
    """Save triggers, run.json and, last, the masks; refuse weights that changed while masks were learned."""
    warn_about_masks(*learned)
    for checkpoint in inputs:
        checkpoint.require_unchanged()
    if isinstance(search, ScannedSearch):
        marked = {finding.key for finding in search.suspects()}
        save_triggers(folder / TRIGGERS_FILE, search.findings, search.tasks, marked)
    write_run(folder, plan, run)
    made = () if stand_ins is None else stand_ins.all()
    save(folder / MASKS_FILE, LearnedMasks(*learned, metadata, stand_ins=made))


def _digests_in(description: Mapping[str, Any]) -> dict[str, str]:
    """Return the content hashes of the weights in a description, by model name."""
    return {"base": description["base"]["sha256"], **{m["name"]: m["sha256"] for m in description["models"]}}
