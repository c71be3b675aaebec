"""Plan -> masks: check everything, look into the cache, else learn, here or in worker processes, and save."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from filelock import FileLock

from mergekit_dam.artifact.masks_file import MASKS_FILE, LearnedMasks, describe, load
from mergekit_dam.artifact.match import load_cached, verify
from mergekit_dam.config import DamConfig
from mergekit_dam.engine.processes import Job, run_workers
from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.errors import DamError
from mergekit_dam.io.cache import cache_folder, code_digest, library_versions
from mergekit_dam.io.files import require_own
from mergekit_dam.learn.optimise import optimise
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.plan import Plan
from mergekit_dam.tasks import build_tasks

LOG = logging.getLogger(__name__)
CPU = torch.device("cpu")


def learn_masks(
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
    digests = shards.union({name: c.digest(fresh=plan.config.rehash) for name, c in checkpoints.items()})
    if plan.config.masks is not None:
        path = Path(plan.config.masks).expanduser()
        masks = load(path, fresh=plan.config.rehash)
        verify(masks, plan, digests, path=path)
        _warn(masks)
        return path.parent, masks
    count = num_processes(plan.config) if shards.size == 1 else 1
    # a parent of workers only reads the data: it must not open the accelerators that they will use
    place = CPU if count > 1 else device or device_of(plan.config.device)
    tasks = build_tasks(plan, place)
    description = describe(plan, digests, {task.name: list(task.sample_digests) for task in tasks})
    facts = [description, library_versions(), code_digest()]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder() / key
    if first:
        _make(folder)
    # a second run on the same inputs waits and then finds the masks
    with FileLock(folder / ".lock") if first else nullcontext():
        cached = load_cached(folder / MASKS_FILE, plan, digests, fresh=plan.config.rehash) if first else None
        if shards.union({"there": cached is not None} if first else {})["there"]:
            masks = cached or load(folder / MASKS_FILE)
            if first:
                LOG.warning("dam: masks from the cache %s; nothing is learned", folder)
                _warn(masks)
            return folder, masks
        inputs = tuple(checkpoints.values())
        if count > 1:
            run_workers(Job(plan, folder, description, inputs, quiet), count)
        else:
            optimise(plan, folder, description, inputs, tasks, place, shards=shards, quiet=quiet)
        return folder, load(folder / MASKS_FILE)


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
            f"cache {folder}", expected="a folder that can be written", got=str(error),
            cure="Set MERGEKIT_DAM_CACHE to one.",
        ) from error  # fmt: skip
    require_own(folder, "Masks of others are not used unasked: remove it, or set MERGEKIT_DAM_CACHE to another folder.")


def device_of(name: str) -> torch.device:
    """`auto` is accelerate's choice."""
    if name == "auto":
        chosen: torch.device = Accelerator().device
        return chosen
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DamError(
            "setting 'device'", expected="auto, cpu or an accelerator of this machine", got=name,
            cure="Leave it out to let accelerate pick.",
        ) from error  # fmt: skip
