"""Compare merge throughput with ready masks to mergekit's own methods on the same files."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from dam_bench.performance.clock import environment
from dam_bench.performance.shapes import make_models
from mergekit_dam.artifact.masks_file import MASKS_FILE, LearnedMasks, describe, save
from mergekit_dam.io.cache import KNOWN, cache_folder
from mergekit_dam.merging.mask_keys import BACKDOOR_DETECTION, TASK_SHARED
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.plan import Plan, build_plan
from mergekit_dam.plugin.method import register_dam
from mergekit_dam.seeds import generator

_RUNS = 21  # of each method in turn; the median counts, since what the system adds for fresh memory varies twofold
_FIRST_RUNS = 3  # with all content read again: these take longer and vary less
_SETTLED = 4.0  # seconds, see io/cache.py
_FIRST = "dam first"
METHODS: Mapping[str, dict[str, Any]] = {"task_arithmetic": {}, "ties": {"density": 0.5}}


def measure_merges(shapes: str, tasks: int, other: str, folder: Path) -> dict[str, Any]:
    """Processor seconds of whole merges, read to written; `dam` has ready masks of random values.

    `dam` is measured twice: with content that is known from an earlier merge (io/cache.py), as in every merge of these
    files but the first, and with nothing known, as in the first one.

    Args:
        other: one of METHODS, to compare with.

    Returns:
        Seconds by method, and `throughput_ratio`: parameters per second of dam over those of the other method;
        `first_throughput_ratio`: the same with nothing known.
    """
    made = make_models(shapes, tasks, folder)
    base, *models = (ModelReference.parse(str(path.absolute())) for path in made.models)
    masks = folder / f"masks-{shapes}" / MASKS_FILE
    _random_masks(build_plan(base, models, shared={}, per_model={}), masks)
    register_dam()
    seconds: dict[str, list[float]] = {}
    parameters: dict[str, dict[str, Any]] = {
        "dam": {"masks": str(masks)},
        _FIRST: {"masks": str(masks)},
        other: {"weight": 0.3, **METHODS[other]},
    }
    with _own_cache(folder / "cache"):
        time.sleep(_SETTLED)  # what was written just now is not remembered
        for method, own in parameters.items():  # the first one of a process pays for imports
            _merge(method.split()[0], own, base, models, folder / "merged")
        for number in range(_RUNS):
            for method, own in parameters.items():
                if method == _FIRST and number >= _FIRST_RUNS:
                    continue
                if method == _FIRST:
                    shutil.rmtree(cache_folder() / KNOWN, ignore_errors=True)
                found = _merge(method.split()[0], own, base, models, folder / "merged")
                seconds.setdefault(method, []).append(found)
    middle = {method: statistics.median(found) for method, found in seconds.items()}
    return {
        "shapes": shapes,
        "tasks": tasks,
        "seconds": seconds,
        "throughput_ratio": {other: middle[other] / middle["dam"]},
        "first_throughput_ratio": {other: middle[other] / middle[_FIRST]},
        "environment": environment(torch.device("cpu")),
    }


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    before = os.environ.get("MERGEKIT_DAM_CACHE")
    os.environ["MERGEKIT_DAM_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("MERGEKIT_DAM_CACHE")
        if before is not None:
            os.environ["MERGEKIT_DAM_CACHE"] = before


def _merge(
    method: str, parameters: dict[str, Any], base: ModelReference, models: list[ModelReference], out: Path
) -> float:
    source = yaml.safe_dump(
        {
            "merge_method": method,
            "base_model": str(base),
            "models": [{"model": str(ref)} for ref in models],
            "parameters": parameters,
            "dtype": "float32",
        }
    )
    config = MergeConfiguration.model_validate(yaml.safe_load(source))
    wall, start = time.perf_counter(), _processor_seconds()
    run_merge(
        config, str(out), MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False), config_source=source
    )
    elapsed = _processor_seconds() - start if torch.get_num_threads() == 1 else time.perf_counter() - wall
    shutil.rmtree(out)
    return elapsed


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _random_masks(plan: Plan, path: Path) -> None:
    """Masks as learning leaves them: a probability for every element, coefficients per tensor."""
    names = list(dict.fromkeys(spec.mask_name for spec in plan.tensors if spec.dtype.is_floating_point))
    shapes = {spec.mask_name: spec.shape for spec in plan.tensors}
    probabilities = {
        mask: {name: torch.rand(shapes[name], generator=generator(mask, name)) for name in names}
        for mask in (TASK_SHARED, BACKDOOR_DETECTION)
    }
    digests = {model.name: Checkpoint.open(model.path).digest() for model in (plan.base, *plan.models)}
    metadata = describe(plan, digests, {}) | {"tensors": names}
    save(path, LearnedMasks(probabilities, torch.full((len(plan.models), len(names)), 0.3), metadata))
