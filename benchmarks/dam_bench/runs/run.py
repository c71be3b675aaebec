"""One run: a scenario merged by a method with a seed, evaluated, as one JSON. It happens in a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from torch import nn

from dam_bench.runs.methods import Method, method_named
from dam_bench.runs.peer import merge_with_fusion_bench, peer_report
from dam_bench.suites.base import Poison, Scenario, Suite, no_progress
from dam_bench.suites.registry import SUITES
from dam_bench.victims.zoo import Zoo
from mergekit_dam.artifact.masks_file import MASKS_FILE
from mergekit_dam.evaluation.metrics import Attack, accuracy, evaluate_merge
from mergekit_dam.io.cache import library_versions
from mergekit_dam.io.calibration import digest
from mergekit_dam.merging.mask_bytes import to_probabilities

SCHEMA = 1


@dataclass(frozen=True)
class Job:
    """What a run is, in plain values that go to another process."""

    suite: str
    preset: str
    data: Path | None
    cache: Path
    results: Path
    scenario: Scenario
    scenarios: tuple[Scenario, ...]
    method: str
    seed: int
    threads: int

    @property
    def folder(self) -> str:
        """The suite's folder of results: its first preset has the plain name."""
        return self.suite if self.preset == SUITES[self.suite].presets[0] else f"{self.suite}-{self.preset}"

    @property
    def result(self) -> Path:
        """Where its JSON goes."""
        return self.results / self.folder / self.scenario.name / f"{self.method}-seed{self.seed}.json"

    def zoo(self) -> Zoo:
        """The models of its suite."""
        return _zoo(self.suite, self.preset, self.data, self.cache)


@lru_cache(maxsize=1)
def _zoo(suite: str, preset: str, data: Path | None, cache: Path) -> Zoo:
    """Kept in a worker from run to run: reading and drawing the data takes longer than most merges."""
    return Zoo(SUITES[suite](data, preset), cache, no_progress)


def prepare(job: Job, task: str, poison: Poison | None) -> str:
    """Build one input model; for a worker process."""
    _quiet(job.threads)
    return str(job.zoo().model(task, poison, job.seed))


def perform(job: Job) -> str:
    """Merge, evaluate and write the JSON; for a worker process. Returns its path."""
    _quiet(job.threads)
    zoo, method = job.zoo(), method_named(job.method)
    models = zoo.models(job.scenario, job.seed)
    calibration = {task: zoo.calibration(task) for task in models} if _needs_data(method) else {}
    attacks = _attacks(job, zoo)
    with tempfile.TemporaryDirectory(dir=job.cache) as folder:
        merge = _merged(method, zoo, models, calibration, job.seed, Path(folder))
        loaded = _loaded(zoo.suite, models, merge.out)
        seen = {digest(sample) for task in calibration for sample in zoo.suite.split(task).calibration}
        data = {task: zoo.suite.split(task).evaluation for task in zoo.suite.tasks}
        scores = evaluate_merge(loaded, data, attacks, calibration=seen)
        kept = general_ability(zoo.suite, loaded, whole=merge.out is not None)
        learned = _learned(merge.out)
    result = {
        "schema": SCHEMA,
        "suite": job.suite,
        "preset": job.preset,
        "scenario": job.scenario.name,
        "poisons": {task: str(poison) for task, poison in job.scenario.poisons.items()},
        "method": method.name,
        "family": method.family,
        "settings": dict(method.parameters),
        "seed": job.seed,
        **scores.to_json(),
        "calibration_samples": _samples(zoo, calibration),
        "wall_s": merge.seconds,
        "peak_bytes": merge.peak_bytes,
        "threads": job.threads,
        "versions": library_versions(),
        "hardware": hardware(),
        **kept,
        **learned,
    }
    job.result.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.result.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", "utf-8")
    temporary.replace(job.result)
    return str(job.result)


def general_ability(suite: Suite, models: Mapping[str, nn.Module], *, whole: bool) -> dict[str, dict[str, list[int]]]:
    """Counts of the suite's general questions that are answered rightly, as {"general": {model: [hits, total]}}.

    Args:
        models: task -> model.
        whole: whether they are one merge, which is asked once and called "merge".

    Returns:
        Nothing for suites without such questions.
    """
    questions = suite.general()
    if questions is None:
        return {}
    asked = {"merge": next(iter(models.values()))} if whole else models
    rates = {name: accuracy(model, questions) for name, model in asked.items()}
    return {"general": {name: [rate.hits, rate.total] for name, rate in rates.items()}}


def hardware() -> str:
    """Accelerator, or processor, and how many."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return f"{os.cpu_count()} x {line.partition(':')[2].strip()}"
    return f"{os.cpu_count()} x {platform.machine()}"


def _quiet(threads: int) -> None:
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _needs_data(method: Method) -> bool:
    return method.learns or method.name == "fusion_bench-dam"


def _attacks(job: Job, zoo: Zoo) -> list[Attack]:
    """Those of the scenario; on the all-clean one, all attacks of all scenarios, which gives the floor."""
    chosen = (job.scenario,) if job.scenario.poisons else job.scenarios
    found: dict[str, Attack] = {}
    for scenario in chosen:
        for task, poison in scenario.poisons.items():
            name = f"{task}={poison}"
            found[name] = Attack(name, poison.onto or task, zoo.trigger(task, poison, job.seed), poison.target)
    return list(found.values())


@dataclass(frozen=True)
class _Merge:
    """A finished merge: its directory (None where every task keeps its own model), seconds, and memory above start."""

    out: Path | None
    seconds: float | None = None
    peak_bytes: int | None = None


def _merged(
    method: Method, zoo: Zoo, models: Mapping[str, Path], calibration: Mapping[str, Path], seed: int, folder: Path
) -> _Merge:
    if method.name == "fine-tuned":
        return _Merge(None)
    base, out = zoo.base(), folder / "out"
    if method.merge_method is None:
        merge_with_fusion_bench(base, models, calibration, seed=seed, folder=folder)
        report = peer_report(out)
        return _Merge(out, round(report["seconds"]["all"], 2), report["peak_rss_bytes"])
    os.environ["MERGEKIT_DAM_CACHE"] = str(folder / "cache")  # a run must not find the masks of another
    recipe = method.recipe(zoo.suite, base, models, calibration, seed, folder)
    config = MergeConfiguration.model_validate(recipe)
    options = MergeOptions(quiet=True, copy_tokenizer=False, random_seed=seed)
    before, start = _start_peak(), time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        run_merge(config, str(out), options, config_source=yaml.safe_dump(recipe))  # which names the heads' models
    seconds, after = round(time.perf_counter() - start, 2), _peak_bytes()
    return _Merge(out, seconds, None if before is None or after is None else max(0, after - before))


def _loaded(suite: Suite, models: Mapping[str, Path], out: Path | None) -> dict[str, nn.Module]:
    if out is None:
        return {task: suite.load_model(path) for task, path in models.items()}
    return {task: suite.load_merge(out, path) for task, path in models.items()}


def _samples(zoo: Zoo, calibration: Mapping[str, Path]) -> int:
    return max((len(zoo.suite.split(task).calibration) for task in calibration), default=0)


def _start_peak() -> int | None:
    """Forget the process's peak memory so far (Linux); what is in use now, in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")
        return _peak_bytes()
    return None


def _peak_bytes() -> int | None:
    """Peak resident memory since `_start_peak`, in bytes; None where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    return None


def _learned(out: Path | None) -> dict[str, Any]:
    """Density per layer and mask, mean coefficients per model, and the scan's findings, of a merge by `dam`."""
    if out is None or not (out / "dam" / MASKS_FILE).is_file():
        return {}
    from mergekit_dam.artifact.masks_file import load

    masks = load(out / "dam" / MASKS_FILE)
    sums: dict[str, dict[str, list[float]]] = {}
    for tensor in masks.metadata["tensors"]:
        layer = next((part for part in tensor.split(".") if part.isdigit()), "other")
        for name, parts in masks.parts_of(tensor).items():
            total = sums.setdefault(layer, {}).setdefault(name, [0.0, 0.0])
            total[0] += sum(float(to_probabilities(part).sum()) for part in parts)
            total[1] += sum(part.numel() for part in parts)
    density = {layer: {m: round(s / n, 4) for m, (s, n) in by.items()} for layer, by in sums.items()}
    coefficients = [round(float(c), 4) for c in masks.coefficients.mean(1)]
    return {"density": density, "coefficients": coefficients, "audit": masks.metadata.get("audit", [])}
