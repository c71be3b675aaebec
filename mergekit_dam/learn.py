"""Plan -> masks: check everything, look into the cache, else learn, here or in worker processes, and save."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from filelock import FileLock
from safetensors.torch import save_file

from mergekit_dam.artifact import MASKS_FILE, LearnedMasks, describe, library_versions, load, save, verify
from mergekit_dam.checkpoint import Checkpoint
from mergekit_dam.config import DamConfig
from mergekit_dam.defence import InversionSearch
from mergekit_dam.distributed.launcher import Job, run_workers
from mergekit_dam.distributed.shards import ALONE, Shards
from mergekit_dam.distributed.snapshots import Snapshots
from mergekit_dam.errors import DamError
from mergekit_dam.merged_model import MergedModel
from mergekit_dam.plan import Plan
from mergekit_dam.search import PaperSearch
from mergekit_dam.task_vectors import TaskVectors, survey
from mergekit_dam.tasks import Task, build_tasks

LOG = logging.getLogger(__name__)
CPU = torch.device("cpu")
_OBJECTIVES: dict[str, type[InversionSearch | PaperSearch]] = {"inversion": InversionSearch, "paper": PaperSearch}


def cache_folder() -> Path:
    """Where learned masks are kept: MERGEKIT_DAM_CACHE, else ~/.cache/mergekit-dam."""
    return Path(os.environ.get("MERGEKIT_DAM_CACHE") or Path.home() / ".cache" / "mergekit-dam")


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
    inputs = (plan.base, *plan.models) if first else ()
    digests = shards.union({model.name: Checkpoint.open(model.path).digest() for model in inputs})
    if plan.config.masks is not None:
        path = Path(plan.config.masks).expanduser()
        masks = load(path)
        verify(masks, plan, digests, path=path)
        return path.parent, masks
    count = num_processes(plan.config) if shards.size == 1 else 1
    # a parent of workers only reads the data: it must not open the accelerators that they will use
    place = CPU if count > 1 else device or _device(plan.config.device)
    tasks = build_tasks(plan, place)
    description = describe(plan, digests, {task.name: list(task.sample_digests) for task in tasks})
    key = hashlib.sha256(json.dumps([description, library_versions()], sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder() / key
    if first:
        _make(folder)
    # a second run on the same inputs waits and then finds the masks
    with FileLock(folder / ".lock") if first else nullcontext():
        if shards.union({"there": (folder / MASKS_FILE).is_file()} if first else {})["there"]:
            LOG.warning("dam: masks from the cache %s; nothing is learned", folder)
        elif count > 1:
            run_workers(Job(plan, folder, description, quiet), count)
        else:
            optimise(plan, folder, description, tasks, place, shards=shards, quiet=quiet)
        return folder, load(folder / MASKS_FILE)


def optimise(
    plan: Plan, folder: Path, description: dict[str, Any], tasks: Sequence[Task], device: torch.device, *,
    shards: Shards, quiet: bool,
) -> None:  # fmt: skip
    """Learn masks and save them, with metrics and heads, into `folder`; goes on where a run was cut short.

    Args:
        plan: what is merged.
        folder: of the artefact, locked by the caller.
        description: what the masks depend on.
        tasks: of the plan.
        device: of this process.
        shards: processes that call this together.
        quiet: no progress bar.
    """
    first, config = shards.rank == 0, plan.config
    vectors = TaskVectors(plan)
    found = survey(vectors, shards)
    model = MergedModel(vectors, found.changed, device, shards)
    snapshots = Snapshots(folder / "run", every=config.snapshot_every, resume=config.resume, shards=shards)
    if first:
        _save_heads(tasks, folder / "heads")
    with _journal(folder / "metrics.jsonl" if first else Path(os.devnull), snapshots) as metrics:
        last: dict[str, Any] = {}

        def track(record: dict[str, Any]) -> None:
            last.update(record)
            metrics.write(json.dumps(record) + "\n")

        def progress(steps: Iterable[int], title: str) -> Iterable[int]:
            done = {"initial": steps.start, "total": steps.stop} if isinstance(steps, range) and steps.step == 1 else {}
            bar = tqdm(steps, desc=f"dam: {title}", disable=quiet or None, file=sys.stderr, **done)
            for step in bar:
                yield step
                shown = {k: f"{v:.3f}" for k, v in last.items() if k == "loss" or k.startswith("density/")}
                bar.set_postfix(shown, refresh=False)

        start = torch.tensor([m.settings.weight for m in plan.models])
        search = _OBJECTIVES[config.objective](
            model, tasks, config, start, track=track, progress=progress, snapshots=snapshots
        )
        probabilities, coefficients = search.run()
    metadata = description | {
        "tensors": list(model.mask_names), "seed": config.seed, "versions": library_versions(),
        "norms": list(found.norms), "densities": {n: m.density() for n, m in search.masks.items()},
        "audit": search.audit(),
    }  # fmt: skip
    if first:
        save(folder / MASKS_FILE, LearnedMasks(probabilities, coefficients, metadata))
    shards.barrier()
    snapshots.clear()


def num_processes(config: DamConfig) -> int:
    """Processes to learn with: as set, else one per accelerator, and one on the CPU."""
    if config.num_processes is not None:
        return config.num_processes
    usable = config.device == "auto" and torch.accelerator.is_available()
    return max(1, torch.accelerator.device_count()) if usable else 1


def _journal(path: Path, snapshots: Snapshots) -> IO[str]:
    """metrics.jsonl as it was at the snapshot that the run goes on from, or empty."""
    facts = snapshots.facts
    file = path.open("a", encoding="utf-8")
    if path.is_file():
        file.truncate(min(path.stat().st_size, facts["journal"]) if facts is not None else 0)

    def length() -> int:
        file.flush()
        if path.is_file():
            os.fsync(file.fileno())
        return file.tell()

    snapshots.follow(length)
    return file


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DamError(
            f"cache {folder}", expected="a folder that can be written", got=str(error),
            cure="Set MERGEKIT_DAM_CACHE to one.",
        ) from error  # fmt: skip


def _save_heads(tasks: Iterable[Task], folder: Path) -> None:
    """Heads that the base lacks stay per task: tensors, and the config of the class that holds them."""
    for task in tasks:
        if task.head:
            folder.mkdir(exist_ok=True)
            tensors = {name: tensor.contiguous().cpu() for name, tensor in task.head.items()}
            save_file(tensors, folder / f"{task.name}.safetensors", metadata={"format": "pt"})
            task.input.config.to_json_file(folder / f"{task.name}.json", use_diff=False)


def _device(name: str) -> torch.device:
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
