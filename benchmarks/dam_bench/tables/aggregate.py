"""Aggregate the runs of a suite: every metric of the benchmark as a value per seed, with the missing seeds.

Missing runs are never averaged or filled in, with one exception: theta_0 ("base") is the same model in every scenario,
so its all-clean run is used for scenarios without a run of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from dam_bench.tables.pareto import Curve, Point, area, margin
from dam_bench.tables.results import CLEAN, RIVALS, Run, Spread, attacked_task, percent
from mergekit_dam.errors import DamError

Metric = Callable[[Run], float | None]
Rates = Mapping[str, Mapping[str, tuple[int, int]]]  # attack -> task -> counts
_TIE = 1e-6  # points of ACC; below it a method lies on the Pareto front, not ahead of it


def suites(runs: Iterable[Run]) -> list[SuiteResults]:
    """Group runs by suite and preset, sorted; presets are never mixed.

    Raises:
        DamError: two files for one run, or runs of one scenario with different poisons.
    """
    groups: dict[tuple[str, str], dict[tuple[str, str, int], Run]] = {}
    poisons: dict[tuple[str, str, str], dict[str, str]] = {}
    for run in runs:
        place = f"{run.method}, seed {run.seed}, scenario {run.scenario} of {run.suite} ({run.preset})"
        group = groups.setdefault((run.suite, run.preset), {})
        if group.setdefault((run.scenario, run.method, run.seed), run) is not run:
            raise DamError(place, expected="one file", got="two", cure="Delete one of them.")
        known = poisons.setdefault((run.suite, run.preset, run.scenario), run.poisons)
        if known != run.poisons or bool(run.poisons) == (run.scenario == CLEAN):
            raise DamError(
                f"poisons of {place}",
                expected=f"{known}, and none in scenario {CLEAN} alone",
                got=str(run.poisons),
                cure="Give every set of poisons its own scenario.",
            )
    return [SuiteResults(suite, preset, group) for (suite, preset), group in sorted(groups.items())]


@dataclass(frozen=True)
class SuiteResults:
    """All runs of a suite and preset, by (scenario, method, seed)."""

    suite: str
    preset: str
    runs: dict[tuple[str, str, int], Run]

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Every seed that any run has."""
        return tuple(sorted({run.seed for run in self.runs.values()}))

    def seeds_of(self, scenario: str) -> tuple[int, ...]:
        """Every seed that any run of a scenario has; a method without one of them has a missing seed."""
        return tuple(sorted({run.seed for run in self.runs.values() if run.scenario == scenario}))

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Every task with a clean accuracy, sorted."""
        return tuple(sorted({task for run in self.runs.values() for task in run.accuracy}))

    @cached_property
    def poisoned(self) -> tuple[str, ...]:
        """Scenarios with a backdoor, sorted."""
        return tuple(sorted({run.scenario for run in self.runs.values() if run.poisons}))

    @cached_property
    def attacks(self) -> tuple[str, ...]:
        """Every attack of every scenario, as "task=attack", sorted."""
        return tuple(sorted({attack for scenario in self.poisoned for attack in self.attacks_of(scenario)}))

    def has(self, scenario: str) -> bool:
        """Whether any run is of this scenario."""
        return any(run.scenario == scenario for run in self.runs.values())

    def attacks_of(self, scenario: str) -> tuple[str, ...]:
        """The attacks of one scenario, as "task=attack"."""
        poisons = next(run.poisons for run in self.runs.values() if run.scenario == scenario)
        return tuple(f"{task}={attack}" for task, attack in sorted(poisons.items()))

    def methods(self, scenario: str) -> list[str]:
        """Methods with a run of the scenario (and theta_0), in the order of tables."""
        orders = {run.method: run.order for run in self.runs.values() if run.scenario == scenario}
        orders |= {run.method: run.order for run in self.runs.values() if run.method == "base"}
        return sorted(orders, key=lambda name: orders[name])

    def any_run(self, method: str) -> Run:
        """Any run of a method, for the method's group, stem and coefficient."""
        return next(run for run in self.runs.values() if run.method == method)

    def run(self, scenario: str, method: str, seed: int) -> Run | None:
        """The run, or None if it is missing."""
        own = self.runs.get((scenario, method, seed))
        return self.runs.get((CLEAN, method, seed)) if own is None and method == "base" else own

    def spread(self, scenario: str, method: str, metric: Metric, *, seeds: tuple[int, ...] | None = None) -> Spread:
        """A metric of a method's runs; seeds whose run is missing, or does not have it, are missing.

        Args:
            seeds: the wanted seeds; default: all seeds that any method has in the scenario.
        """
        wanted = self.seeds_of(scenario) if seeds is None else seeds
        runs = ((seed, self.run(scenario, method, seed)) for seed in wanted)
        values = {seed: metric(run) for seed, run in runs if run is not None}
        return Spread({seed: value for seed, value in values.items() if value is not None}, wanted)

    def accuracy(self, scenario: str, method: str) -> Spread:
        """ACC: mean over tasks of clean accuracy, percent; missing for a run without all tasks."""
        return self.spread(scenario, method, self._accuracy)

    def success(self, scenario: str, method: str, attacks: Iterable[str] | None = None) -> Spread:
        """ASR on the attacked task (succession), percent: mean over attacks, by default the scenario's attacks."""
        names = tuple(attacks or self.attacks_of(scenario))
        return self.spread(scenario, method, lambda run: _success(run.attack_success, names))

    def without_trigger(self, scenario: str, method: str) -> Spread:
        """Share of the same samples of the attacked task that get the target class without the trigger, percent."""
        names = self.attacks_of(scenario)
        return self.spread(scenario, method, lambda run: _success(run.without_trigger, names))

    def transfer(self, scenario: str, method: str) -> Spread:
        """ASR elsewhere: mean over attacks of the mean over the tasks that the attack did not poison, percent."""
        names = self.attacks_of(scenario)
        return self.spread(scenario, method, lambda run: _transfer(run, names))

    def floor(self, scenario: str, method: str) -> Spread:
        """ASR of the scenario's attacks on the same method's all-clean runs of the scenario's seeds, percent."""
        names = self.attacks_of(scenario)
        return self.spread(
            CLEAN, method, lambda run: _success(run.attack_success, names), seeds=self.seeds_of(scenario)
        )

    def excess(self, scenario: str, method: str) -> Spread:
        """Excess ASR: ASR - floor per seed, points; a seed without ASR or floor is missing."""
        success, floor = self.success(scenario, method), self.floor(scenario, method)
        both = success.values.keys() & floor.values.keys()
        return Spread({seed: success.values[seed] - floor.values[seed] for seed in sorted(both)}, success.seeds)

    def score(self, scenario: str, method: str) -> Spread:
        """ACC - max(0, excess ASR) per seed, points; the baseline with the highest score is the hardest."""
        accuracy, excess = self.accuracy(scenario, method), self.excess(scenario, method)
        both = accuracy.values.keys() & excess.values.keys()
        values = {seed: accuracy.values[seed] - max(0.0, excess.values[seed]) for seed in sorted(both)}
        return Spread(values, accuracy.seeds)

    def point(self, scenario: str, method: str, seed: int) -> Point | None:
        """(ACC, ASR on the attacked task), percent."""
        accuracy, success = self.accuracy(scenario, method).values, self.success(scenario, method).values
        return (accuracy[seed], success[seed]) if seed in accuracy and seed in success else None

    def curves(self, scenario: str) -> dict[str, list[str]]:
        """Undefended methods by stem (name without coefficient), each in the order of its coefficients."""
        curves: dict[str, list[str]] = {}
        for method in self.methods(scenario):
            if self.any_run(method).group == "undefended":
                curves.setdefault(self.any_run(method).stem, []).append(method)
        return curves

    def undefended_curve(self, scenario: str, stem: str, seed: int) -> Curve | None:
        """Curve of an undefended method, from theta_0 (coefficient 0) on; None if a point is missing."""
        methods = self.curves(scenario)[stem]
        scaled = self.any_run(methods[0]).coefficient is not None
        points = [self.point(scenario, method, seed) for method in (["base"] if scaled else []) + methods]
        present = [point for point in points if point is not None]
        return present if len(present) == len(points) else None

    def area(self, scenario: str, stem: str) -> Spread:
        """Area under the ACC-ASR curve of an undefended method over its coefficients, percent; see `pareto.area`."""
        curves = {seed: self.undefended_curve(scenario, stem, seed) for seed in self.seeds_of(scenario)}
        return Spread({seed: area([curve]) for seed, curve in curves.items() if curve is not None}, tuple(curves))

    def margin_over_undefended(self, scenario: str, method: str) -> Spread:
        """Margin of a method over the Pareto front of all undefended merges, points of ACC; see `pareto.margin`."""
        values = {}
        for seed in self.seeds_of(scenario):
            point = self.point(scenario, method, seed)
            curves = [self.undefended_curve(scenario, stem, seed) for stem in self.curves(scenario)]
            present = [curve for curve in curves if curve is not None]
            if point is not None and present and len(present) == len(curves):
                values[seed] = margin(point, present)
        return Spread(values, self.seeds_of(scenario))

    def hardest(self, scenarios: Iterable[str], *, rivals: bool = False) -> str | None:
        """The baseline with the highest mean score over the scenarios, among baselines without a missing seed.

        Args:
            scenarios: their names.
            rivals: choose among the defences of others instead.
        """
        names = tuple(scenarios)
        best: tuple[float, str] | None = None
        compared = {
            run.method for run in self.runs.values() if (run.group in RIVALS if rivals else run.family == "baseline")
        }
        for method in sorted(compared):
            scores = [self.score(name, method) for name in names]
            if scores and not any(score.missing for score in scores):
                mean = sum(score.mean for score in scores) / len(scores)
                if best is None or mean > best[0]:
                    best = mean, method
        return best[1] if best else None

    def most_accurate(self, scenario: str) -> str | None:
        """The undefended merge with the highest mean accuracy in a scenario, among merges without a missing seed."""
        best: tuple[float, str] | None = None
        for method in sorted(name for names in self.curves(scenario).values() for name in names):
            accuracy, success = self.accuracy(scenario, method), self.success(scenario, method)
            if not accuracy.missing and not success.missing and (best is None or accuracy.mean > best[0]):
                best = accuracy.mean, method
        return best[1] if best else None

    def _accuracy(self, run: Run) -> float | None:
        if set(run.accuracy) != set(self.tasks):
            return None
        return sum(percent(counts) for counts in run.accuracy.values()) / len(run.accuracy)


def is_ahead(value: float) -> bool:
    """Whether a margin is above the tolerance for ties."""
    return value > _TIE


def _success(by_attack: Rates, attacks: tuple[str, ...]) -> float | None:
    rates = [by_attack.get(attack, {}).get(attacked_task(attack)) for attack in attacks]
    percents = [percent(counts) for counts in rates if counts is not None]
    return sum(percents) / len(percents) if percents and len(percents) == len(rates) else None


def _transfer(run: Run, attacks: tuple[str, ...]) -> float | None:
    means = []
    for attack in attacks:
        rates = run.attack_success.get(attack, {})
        elsewhere = [percent(counts) for task, counts in rates.items() if task != attacked_task(attack)]
        if not elsewhere:
            return None
        means.append(sum(elsewhere) / len(elsewhere))
    return sum(means) / len(means) if means else None
