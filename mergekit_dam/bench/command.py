"""`mergekit-dam bench SUITE`: build models, check the gates, run every method on every scenario, one JSON each.

What is finished is found again, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate.utils import tqdm

from mergekit_dam.bench.aggregate import suites
from mergekit_dam.bench.gates import check_gates, gate_table, require
from mergekit_dam.bench.methods import GATES, METHODS, method_named
from mergekit_dam.bench.results import read_runs
from mergekit_dam.bench.run import Job, perform, prepare
from mergekit_dam.bench.suite import Poison, Scenario, Suite
from mergekit_dam.bench.suites import SUITES
from mergekit_dam.config import did_you_mean
from mergekit_dam.errors import DamError

Note = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    suite: str
    preset: str | None
    data: Path | None
    out: Path
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    scenarios: tuple[str, ...]
    extra: tuple[Scenario, ...]
    workers: int
    threads: int
    gates: bool
    dry_run: bool


def bench(options: Options, note: Note) -> None:
    """Run a suite. JSONs go to `out/results`, models to `out/models`.

    Raises:
        DamError: an unknown suite, scenario or method, missing data, or a gate that fails.
    """
    suite = _suite(options)
    scenarios = (*suite.scenarios, *options.extra)
    chosen = _chosen(options.scenarios, {s.name: s for s in scenarios}, "scenario")
    methods = [method_named(name) for name in _with_gates(options.methods)]
    first = Job(
        suite.name, suite.preset, options.data, options.out / "models", options.out / "results", scenarios[0],
        scenarios, "base", options.seeds[0], options.threads,
    )  # fmt: skip
    if scenarios[0] not in chosen:
        chosen = [scenarios[0], *chosen]  # the floor of every other scenario
    jobs = [
        replace(first, scenario=scenario, method=method.name, seed=seed)
        for method in methods for seed in options.seeds for scenario in chosen
    ]  # fmt: skip
    gate_jobs = [job for job in jobs if job.method in GATES]
    note(_announce(suite, first, jobs, options))
    if options.dry_run:
        return
    first.cache.mkdir(parents=True, exist_ok=True)
    first.zoo().base()
    build = {(task, job.scenario.poisons.get(task), job.seed): job for job in jobs for task in suite.tasks}
    missing = [
        (job, task, poison) for (task, poison, _), job in build.items()
        if not first.zoo().has_model(task, poison, job.seed)
    ]  # fmt: skip
    with _pool(options.workers) as pool:
        _wait([pool.submit(prepare, *one) for one in missing], "building models")
        _wait([pool.submit(perform, job) for job in gate_jobs if not job.result.is_file()], "undefended merges")
        if options.gates:
            _pass_gates(first.results, suite, note)
        rest = [job for job in jobs if job not in gate_jobs and not job.result.is_file()]
        _wait([pool.submit(perform, job) for job in rest], "other methods")


def _suite(options: Options) -> Suite:
    if options.suite not in SUITES:
        raise DamError(
            "suite", expected=f"one of {', '.join(SUITES)}", got=repr(options.suite),
            cure=did_you_mean(options.suite, SUITES) or "Choose one of them.",
        )  # fmt: skip
    kind = SUITES[options.suite]
    return kind(options.data, options.preset or kind.presets[0])


def _chosen(names: Sequence[str], known: dict[str, Scenario], what: str) -> list[Scenario]:
    for name in names:
        if name not in known:
            raise DamError(
                what, expected=f"one of {', '.join(known)}", got=repr(name),
                cure=did_you_mean(name, known) or f"Leave --{what} out to run all.",
            )  # fmt: skip
    return [known[name] for name in names] if names else list(known.values())


def _with_gates(names: Sequence[str]) -> list[str]:
    """Methods to run, references and undefended merges first, since the gates need them."""
    return [*GATES, *(name for name in (names or METHODS) if name not in GATES)]


def _announce(suite: Suite, first: Job, jobs: Sequence[Job], options: Options) -> str:
    """How much there is to do, and how long it takes on the reference machine."""
    zoo = first.zoo()
    models = {(task, job.scenario.poisons.get(task), job.seed) for job in jobs for task in suite.tasks}
    missing: list[Poison | None] = [p for task, p, seed in models if not zoo.has_model(task, p, seed)]
    left = [job for job in jobs if not job.result.is_file()]
    seconds = sum(suite.cost(poison) for poison in missing)
    seconds += sum(suite.run_cost(method_named(job.method).passes) for job in left)
    return (
        f"suite {suite.name} ({suite.preset}): {len(missing)} of {len(models)} models to build, {len(left)} of "
        f"{len(jobs)} runs to do; about {seconds / options.workers / 60:.0f} minutes with {options.workers} workers"
    )


def _pass_gates(results: Path, suite: Suite, note: Note) -> None:
    """Print the gates of a suite; the first that fails ends the benchmark."""
    runs = [run for run in read_runs(results) if (run.suite, run.preset) == (suite.name, suite.preset)]
    gates = [gate for measured in suites(runs) for gate in check_gates(measured)]
    note(gate_table(gates))
    require(gates)


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mergekit_dam.bench.run"])
    return ProcessPoolExecutor(workers, mp_context=context)


def _wait(futures: Sequence[Future[str]], title: str) -> None:
    """Wait with a progress bar; the first error ends the benchmark, and what is finished stays."""
    done: Iterable[Future[str]] = as_completed(futures)
    for future in tqdm(done, total=len(futures), desc=title, file=sys.stderr, disable=None if futures else True):
        try:
            future.result()
        except BaseException:
            for other in futures:
                other.cancel()
            raise
