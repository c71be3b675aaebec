"""Run a suite: build models, check the gates, run every method on every scenario, and write a JSON per run.

Finished models and runs are reused, so an interrupted benchmark resumes where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate.utils import tqdm

from dam_bench.defences.registry import DEFENCES, require_suited
from dam_bench.runs.methods import GATES, METHODS, method_named
from dam_bench.runs.pool import pool_of
from dam_bench.runs.run import Job, perform, prepare
from dam_bench.suites.base import Family, Poison, Scenario, Suite
from dam_bench.suites.registry import SUITES
from dam_bench.tables.aggregate import suites
from dam_bench.tables.gates import Gate, check_gates, gate_table, require
from dam_bench.tables.results import read_runs
from mergekit_dam.errors import DamError, did_you_mean

Note = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """Options of the command line; see `dam_bench.cli`."""

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


@dataclass(frozen=True)
class ToDo:
    """Numbers of models and runs of a command line, in total and still to make.

    Attributes:
        suite: name of the suite.
        preset: size of the suite.
        models: number of fine-tunes, and number to build; models that no unfinished run needs are not built.
        runs: number of result files, and number to make.
        minutes: time on the reference machine with the given number of workers.
    """

    suite: str
    preset: str
    models: tuple[int, int]
    runs: tuple[int, int]
    minutes: float

    def __str__(self) -> str:
        return (
            f"suite {self.suite} ({self.preset}): {self.models[1]} of {self.models[0]} models to build, "
            f"{self.runs[1]} of {self.runs[0]} runs to do"
        )


@dataclass(frozen=True)
class Outcome:
    """Numbers of models and runs to make, existing result files, and checked gates."""

    to_do: ToDo
    results: tuple[Path, ...]
    gates: tuple[Gate, ...]


def bench(options: Options, note: Note) -> Outcome:
    """Run a suite, and write JSONs to `out/results` and models to `out/models`.

    Returns:
        All result files of this command line; with `dry_run` those that existed before.

    Raises:
        DamError: an unknown suite, scenario or method, missing data, or a gate that fails.
    """
    suite = _suite(options)
    scenarios = (*suite.scenarios, *options.extra)
    chosen = _chosen(options.scenarios, (*scenarios, *suite.further)) or list(scenarios)
    scenarios = tuple({scenario.name: scenario for scenario in (*scenarios, *chosen)}.values())
    methods = [method_named(name) for name in _methods(options, suite.family)]
    for method in methods:
        if method.defence is not None:
            require_suited(method.defence, suite.family)
    first = Job(
        suite.name,
        suite.preset,
        options.data,
        options.out / "models",
        options.out / "results",
        scenarios[0],
        scenarios,
        "base",
        options.seeds[0],
        options.threads,
    )
    if options.gates and scenarios[0] not in chosen:
        chosen = [scenarios[0], *chosen]  # the floor of every other scenario
    jobs = [
        replace(first, scenario=scenario, method=method.name, seed=seed)
        for method in methods
        for seed in options.seeds
        for scenario in chosen
    ]
    gate_jobs = [job for job in jobs if job.method in GATES]
    store, left = first.store(), [job for job in jobs if not job.result.is_file()]
    missing = [
        (job, task, poison)
        for (task, poison, seed), job in _models(suite, left).items()
        if not store.has_model(task, poison, seed)
    ]
    to_do = _to_do(suite, len(_models(suite, jobs)), [poison for _, _, poison in missing], jobs, options)
    note(f"{to_do}; about {to_do.minutes:.0f} minutes with {options.workers} workers")
    if options.dry_run:
        return _outcome(to_do, jobs)
    first.cache.mkdir(parents=True, exist_ok=True)
    if left:
        store.base()
    with pool_of(options.workers) as pool:
        _wait([pool.submit(prepare, *arguments) for arguments in missing], "building models")
        _wait([pool.submit(perform, job) for job in left if job in gate_jobs], "undefended merges")
        gates: list[Gate] = []
        if options.gates:
            gates = _gates(first.results, suite.name, suite.preset)
            note(gate_table(gates))
            require(gates)
        _wait([pool.submit(perform, job) for job in left if job not in gate_jobs], "other methods")
    return _outcome(to_do, jobs, gates)


def _models(suite: Suite, jobs: Sequence[Job]) -> dict[tuple[str, Poison | None, int], Job]:
    """Task, poison and seed of every model that these jobs merge, with one of the jobs."""
    return {(task, job.scenario.poisons.get(task), job.seed): job for job in jobs for task in suite.tasks}


def _suite(options: Options) -> Suite:
    if options.suite not in SUITES:
        raise DamError(
            "suite",
            expected=f"one of {', '.join(SUITES)}",
            got=repr(options.suite),
            cure=did_you_mean(options.suite, SUITES) or "Choose one of them.",
        )
    kind = SUITES[options.suite]
    return kind(options.data, options.preset or kind.presets[0])


def _chosen(names: Sequence[str], scenarios: Sequence[Scenario]) -> list[Scenario]:
    known = {scenario.name: scenario for scenario in scenarios}
    for name in names:
        if name not in known:
            raise DamError(
                "scenario",
                expected=f"one of {', '.join(known)}",
                got=repr(name),
                cure=did_you_mean(name, known) or "Leave --scenario out to run the usual ones.",
            )
    return [known[name] for name in names]


def _methods(options: Options, family: Family) -> list[str]:
    """Methods to run: references and undefended merges first, which the gates need; without gates what was asked.

    Without names all methods that suit the models.
    """
    suited = [name for name, method in METHODS.items() if _is_suited(method.defence, family)]
    names = list(options.methods or suited)
    return [*GATES, *(name for name in names if name not in GATES)] if options.gates else names


def _is_suited(defence: str | None, family: Family) -> bool:
    return defence is None or family in DEFENCES[defence].families


def _to_do(suite: Suite, models: int, missing: Sequence[Poison | None], jobs: Sequence[Job], options: Options) -> ToDo:
    """How much there is to do, and how long it takes on the reference machine.

    Args:
        models: how many the jobs need.
        missing: of those, the poisons of what is to be built.
    """
    left = [job for job in jobs if not job.result.is_file()]
    seconds = sum(suite.cost(poison) for poison in missing)
    seconds += sum(suite.run_cost(method_named(job.method).passes) for job in left)
    return ToDo(
        suite.name, suite.preset, (models, len(missing)), (len(jobs), len(left)), seconds / options.workers / 60
    )


def _gates(results: Path, suite: str, preset: str) -> list[Gate]:
    """The gates of all results of a suite that there are."""
    runs = [run for run in read_runs(results) if (run.suite, run.preset) == (suite, preset)]
    return [gate for measured in suites(runs) for gate in check_gates(measured)]


def _outcome(to_do: ToDo, jobs: Sequence[Job], gates: Sequence[Gate] = ()) -> Outcome:
    return Outcome(to_do, tuple(job.result for job in jobs if job.result.is_file()), tuple(gates))


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
