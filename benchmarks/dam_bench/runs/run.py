"""Perform a run in a worker process: merge a scenario by a method with a seed, evaluate it, and write a JSON."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from dam_bench.defences.base import DefenceInputs, run_recipe
from dam_bench.defences.registry import DEFENCES, defence_of, require_suited
from dam_bench.runs.methods import Method, method_named
from dam_bench.runs.peer import merge_with_fusion_bench, peer_report
from dam_bench.suites.base import Poison, Scenario, Suite, no_progress
from dam_bench.suites.registry import SUITES
from dam_bench.victims.cleaned import cleaned_model
from dam_bench.victims.model_store import ModelStore
from mergekit_dam.artifact.masks_file import MASKS_FILE
from mergekit_dam.evaluation.metrics import Attack, accuracy, evaluate_merge
from mergekit_dam.io.cache import library_versions
from mergekit_dam.io.calibration import digest
from mergekit_dam.merging.mask_bytes import to_probabilities

SCHEMA = 1


@dataclass(frozen=True)
class Job:
    """The parameters of a run, as values that can be sent to a worker process."""

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
        """Name of the suite's folder of results; for its first preset, the suite's name alone."""
        return self.suite if self.preset == SUITES[self.suite].presets[0] else f"{self.suite}-{self.preset}"

    @property
    def result(self) -> Path:
        """Path of the run's JSON."""
        return self.results / self.folder / self.scenario.name / f"{self.method}-seed{self.seed}.json"

    def store(self) -> ModelStore:
        """The models of the run's suite."""
        return _store(self.suite, self.preset, self.data, self.cache)


@lru_cache(maxsize=1)
def _store(suite: str, preset: str, data: Path | None, cache: Path) -> ModelStore:
    """Cached between runs of a worker, since reading and drawing the data takes longer than most merges."""
    return ModelStore(SUITES[suite](data, preset), cache, no_progress)


def prepare(job: Job, task: str, poison: Poison | None) -> str:
    """Build an input model, in a worker process."""
    _quiet(job.threads)
    return str(job.store().model(task, poison, job.seed))


def perform(job: Job) -> str:
    """Merge, evaluate, write the JSON and return its path, in a worker process."""
    _quiet(job.threads)
    store, method = job.store(), method_named(job.method)
    if method.defence is not None:
        require_suited(method.defence, store.suite.family)
    models, cleaned = store.models(job.scenario, job.seed), method.cleaned
    if cleaned is not None:
        poisons = {task: job.scenario.poisons.get(task) for task in models}
        models = {task: cleaned_model(store, task, poison, job.seed, cleaned) for task, poison in poisons.items()}
    calibration = {task: store.calibration(task) for task in models} if _needs_data(method) else {}
    attacks = _attacks(job, store)
    with tempfile.TemporaryDirectory(dir=job.cache) as folder:
        merge = _merged(method, store, models, calibration, job.seed, Path(folder))
        loaded = _loaded(store.suite, models, merge.out)
        seen = {digest(sample) for task in calibration for sample in store.suite.split(task).calibration}
        data = {task: store.suite.split(task).evaluation for task in store.suite.tasks}
        scores = evaluate_merge(loaded, data, attacks, calibration=seen, transfer=store.suite.transfer)
        kept = general_ability(store.suite, loaded, whole=merge.out is not None)
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
        **({} if cleaned is None else {"cleaned": dict(cleaned)}),
        **({} if method.defence is None else {"defence": method.defence}),
        "seed": job.seed,
        **scores.to_json(),
        "calibration_samples": _samples(store, calibration),
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
    """Count correct answers to the suite's general questions.

    Args:
        suite: the suite.
        models: task -> model.
        whole: whether the models are the same merge, which is then measured once, under the name "merge".

    Returns:
        {"general": {model: [hits, total]}}; empty for suites without such questions.
    """
    questions = suite.general()
    if questions is None:
        return {}
    measured = {"merge": next(iter(models.values()))} if whole else models
    rates = {name: accuracy(model, questions) for name, model in measured.items()}
    return {"general": {name: [rate.hits, rate.total] for name, rate in rates.items()}}


def hardware() -> str:
    """Number and name of the accelerators, or of the processors."""
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
    if method.defence is not None:
        start = method_named(str(method.parameters["start"]))
        return DEFENCES[method.defence].needs_data or start.learns or method.cleaned is not None
    return method.learns or method.cleaned is not None or method.name == "fusion_bench-dam"


def _attacks(job: Job, store: ModelStore) -> list[Attack]:
    """Attacks of the scenario; for the all-clean scenario, attacks of all scenarios, which gives the floor."""
    chosen = (job.scenario,) if job.scenario.poisons else job.scenarios
    attacks: dict[str, list[Attack]] = {}
    for scenario in chosen:
        for task, poison in scenario.poisons.items():
            name = f"{task}={poison}"
            attacks[name] = store.attacks(name, task, poison, job.seed)
    return [attack for some in attacks.values() for attack in some]


@dataclass(frozen=True)
class _Merge:
    """A finished merge: directory (None where tasks keep their models), seconds, and peak memory above the start."""

    out: Path | None
    seconds: float | None = None
    peak_bytes: int | None = None


def _merged(
    method: Method,
    store: ModelStore,
    models: Mapping[str, Path],
    calibration: Mapping[str, Path],
    seed: int,
    folder: Path,
) -> _Merge:
    if method.merge_method is None and method.family == "reference":  # each task keeps its model, cleaned or not
        return _Merge(None)
    base, out = store.base(), folder / "out"
    if method.defence is not None:
        return _defended(method, store, models, calibration, seed, folder)
    if method.merge_method is None:
        merge_with_fusion_bench(base, models, calibration, seed=seed, folder=folder)
        report = peer_report(out)
        return _Merge(out, round(report["seconds"]["all"], 2), report["peak_rss_bytes"])
    recipe = method.recipe(store.suite, base, models, calibration, seed, folder)
    return _measured(lambda: run_recipe(recipe, seed, out), out)


def _defended(
    method: Method,
    store: ModelStore,
    models: Mapping[str, Path],
    calibration: Mapping[str, Path],
    seed: int,
    folder: Path,
) -> _Merge:
    """Merge by the method that the defence starts from, then defend; both count."""
    assert method.defence is not None
    start = method_named(str(method.parameters["start"]))
    base, suite, out = store.base(), store.suite, folder / "out"
    recipe = start.recipe(suite, base, models, calibration, seed, folder)
    data = calibration if DEFENCES[method.defence].needs_data else {}
    given = DefenceInputs(suite, base, models, data, seed, folder / "start", out)
    defence = defence_of(method.defence, method.parameters)

    def work() -> None:
        run_recipe(recipe, seed, given.start)
        defence.defend(given)

    return _measured(work, out)


def _measured(work: Callable[[], None], out: Path) -> _Merge:
    """Do the work, which writes `out`, and measure it."""
    before, start = _start_peak(), time.perf_counter()
    work()
    seconds, after = round(time.perf_counter() - start, 2), _peak_bytes()
    return _Merge(out, seconds, None if before is None or after is None else max(0, after - before))


def _loaded(suite: Suite, models: Mapping[str, Path], out: Path | None) -> dict[str, nn.Module]:
    if out is None:
        return {task: suite.load_model(path) for task, path in models.items()}
    return {task: suite.load_merge(out, path) for task, path in models.items()}


def _samples(store: ModelStore, calibration: Mapping[str, Path]) -> int:
    return max((len(store.suite.split(task).calibration) for task in calibration), default=0)


def _start_peak() -> int | None:
    """Reset the process's peak memory (Linux), and return the memory in use, in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")
        return _peak_bytes()
    return None


def _peak_bytes() -> int | None:
    """Peak resident memory since `_start_peak`, in bytes; None where the system does not report it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    return None


def _learned(out: Path | None) -> dict[str, Any]:
    """Collect density per layer and mask, mean coefficients per model, and findings of a merge by `dam`."""
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
