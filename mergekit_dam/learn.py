"""Plan -> masks: check everything, look into the cache, else learn and save."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from filelock import FileLock
from safetensors.torch import save_file

from mergekit_dam.artifact import MASKS_FILE, LearnedMasks, describe, library_versions, load, save, verify
from mergekit_dam.artifact_folder import METRICS_FILE, TRIGGERS_FILE, write_run
from mergekit_dam.checkpoint import Checkpoint
from mergekit_dam.defence import InversionSearch
from mergekit_dam.errors import DamError
from mergekit_dam.findings import save_triggers
from mergekit_dam.merged_model import MergedModel
from mergekit_dam.plan import Plan
from mergekit_dam.search import PaperSearch
from mergekit_dam.task_vectors import TaskVectors, survey
from mergekit_dam.tasks import Task, build_tasks
from mergekit_dam.trackers import Tracker

LOG = logging.getLogger(__name__)
_OBJECTIVES: dict[str, type[InversionSearch | PaperSearch]] = {"inversion": InversionSearch, "paper": PaperSearch}


def cache_folder() -> Path:
    """Where learned masks are kept: MERGEKIT_DAM_CACHE, else ~/.cache/mergekit-dam."""
    return Path(os.environ.get("MERGEKIT_DAM_CACHE") or Path.home() / ".cache" / "mergekit-dam")


def learn_masks(plan: Plan, *, quiet: bool = False) -> tuple[Path, LearnedMasks]:
    """Masks for a plan: given ones verified, cached ones loaded, or new ones learned.

    Returns:
        The folder of the artefact (masks, heads, metrics.jsonl) and the masks.

    Raises:
        DamError: anything wrong with models, data or settings, before the first step.
    """
    digests = {model.name: Checkpoint.open(model.path).digest() for model in (plan.base, *plan.models)}
    if plan.config.masks is not None:
        path = Path(plan.config.masks).expanduser()
        masks = load(path)
        verify(masks, plan, digests, path=path)
        return path.parent, masks
    vectors = TaskVectors(plan)
    found = survey(vectors)
    device = device_of(plan.config.device)
    tasks = build_tasks(plan, device)
    description = describe(plan, digests, {task.name: list(task.sample_digests) for task in tasks})
    versions = library_versions()
    key = hashlib.sha256(json.dumps([description, versions], sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder() / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DamError(
            f"cache {folder}", expected="a folder that can be written", got=str(error),
            cure="Set MERGEKIT_DAM_CACHE to one.",
        ) from error  # fmt: skip
    with FileLock(folder / ".lock"):  # a second run on the same inputs waits and then finds the masks
        if (folder / MASKS_FILE).is_file():
            LOG.warning("dam: masks from the cache %s; nothing is learned", folder)
            return folder, load(folder / MASKS_FILE)
        model = MergedModel(vectors, found.changed, device)
        start = torch.tensor([m.settings.weight for m in plan.models])
        _save_heads(tasks, folder / "heads")
        started = datetime.now(timezone.utc)
        seconds: dict[str, float] = {}
        tracker = Tracker(plan.config.tracker, plan.config.model_dump())
        with (folder / METRICS_FILE).open("w", encoding="utf-8") as metrics, closing(tracker):
            last: dict[str, Any] = {}

            def track(record: dict[str, Any]) -> None:
                last.update(record)
                metrics.write(json.dumps(record) + "\n")
                tracker.log(record)

            def progress(steps: Iterable[int], title: str) -> Iterable[int]:
                bar = tqdm(steps, desc=f"dam: {title}", disable=quiet or None, file=sys.stderr)
                begun = time.perf_counter()
                for step in bar:
                    yield step
                    shown = {k: f"{v:.3f}" for k, v in last.items() if k == "loss" or k.startswith("density/")}
                    bar.set_postfix(shown, refresh=False)
                seconds[title] = round(time.perf_counter() - begun, 3)

            search = _OBJECTIVES[plan.config.objective](
                model, tasks, plan.config, start, track=track, progress=progress
            )
            probabilities, coefficients = search.run()
        metadata = description | {
            "tensors": list(model.mask_names), "seed": plan.config.seed, "versions": versions,
            "norms": list(found.norms), "densities": {n: m.density() for n, m in search.masks.items()},
            "audit": search.audit(),
        }  # fmt: skip
        if isinstance(search, InversionSearch):
            save_triggers(folder / TRIGGERS_FILE, search.findings, tasks, search.pools.keys())
        write_run(
            folder, plan, {"started": started.isoformat(timespec="seconds"), "seconds": seconds, "device": str(device)}
        )
        save(folder / MASKS_FILE, LearnedMasks(probabilities, coefficients, metadata))
        return folder, load(folder / MASKS_FILE)


def _save_heads(tasks: Iterable[Task], folder: Path) -> None:
    """Heads that the base lacks stay per task: tensors, and the config of the class that holds them."""
    for task in tasks:
        if task.head:
            folder.mkdir(exist_ok=True)
            tensors = {name: tensor.contiguous().cpu() for name, tensor in task.head.items()}
            save_file(tensors, folder / f"{task.name}.safetensors", metadata={"format": "pt"})
            task.input.config.to_json_file(folder / f"{task.name}.json", use_diff=False)


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
