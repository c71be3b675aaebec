"""When a benchmark counts: the fine-tunes are worth merging, merging works, and the attacks are alive.

Measured on the means over seeds of the reference and undefended runs; that the calibration, evaluation and training
data are disjoint is checked where the data are read, not here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from dam_bench.tables.aggregate import SuiteResults
from dam_bench.tables.results import CLEAN, Spread, attacked_task
from mergekit_dam.errors import DamError

GAIN = 10.0  # points of mean ACC by which the fine-tunes beat theta_0
RECOVERED = 0.5  # share of that gain which the best all-clean undefended merge keeps
VICTIM = 95.0  # ASR of a victim alone, percent
INHERITED = 60.0  # ASR of the undefended merge, percent
# attacks that are built to survive a merge; plain ones may die in it
STRONG = frozenset({"merge-aware", "adaptive", "off-task"})


@dataclass(frozen=True)
class Gate:
    """One condition.

    Attributes:
        name: what is asked.
        passed: whether it holds; a condition without its runs does not.
        measured: the figure, with its spread over seeds.
        wanted: the bound.
    """

    name: str
    passed: bool
    measured: str
    wanted: str


def check_gates(results: SuiteResults, *, strong: Collection[str] = STRONG) -> list[Gate]:
    """All gates of a suite: two on the all-clean runs, then one or two per attack of each scenario.

    Args:
        strong: attacks, without their options, that an undefended merge must inherit.
    """
    gates = _clean_gates(results)
    for scenario in results.poisoned:
        for attack in results.attacks_of(scenario):
            if attacked_task(attack) == attack.partition("=")[0]:  # no model alone has an off-task victim and the head
                victim = results.success(scenario, "fine-tuned", [attack])
                gates.append(_at_least(f"{scenario}: victim alone, ASR of {attack}", victim, VICTIM, "%"))
            if attack.partition("=")[2].partition("(")[0] in strong:
                gates.append(_inherited(results, scenario, attack))
    return gates


def require(gates: Iterable[Gate]) -> None:
    """Raise DamError for the first gate that does not hold, and say how many do not."""
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        more = f" ({len(failed) - 1} more gates fail.)" if len(failed) > 1 else ""
        raise DamError(
            f"gate {failed[0].name!r}",
            expected=failed[0].wanted,
            got=failed[0].measured,
            cure="These results do not count: change how the suite trains its models, not the defence." + more,
        )


def gate_table(gates: Iterable[Gate]) -> str:
    """The gates as a Markdown table, which is also readable on a terminal."""
    rows = [f"| {g.name} | {g.wanted} | {g.measured} | {'yes' if g.passed else '**no**'} |" for g in gates]
    return "\n".join(["| gate | wanted | measured | passed |", "|---|---|---|---|", *rows])


def best_undefended(results: SuiteResults, scenario: str, stem: str | None = None) -> str | None:
    """The undefended merge (of one method, if given) with the highest mean ACC; the first one at a tie."""
    stems = results.curves(scenario) if results.has(scenario) else {}
    methods = [m for name, methods in stems.items() if stem in (None, name) for m in methods]
    accuracy = {method: results.accuracy(scenario, method) for method in methods}
    there = [method for method in methods if accuracy[method].values]
    return max(there, key=lambda method: accuracy[method].mean, default=None)


def _clean_gates(results: SuiteResults) -> list[Gate]:
    base = results.accuracy(CLEAN, "base")
    gain = _difference(results.accuracy(CLEAN, "fine-tuned"), base)
    best = best_undefended(results, CLEAN)
    merged = results.accuracy(CLEAN, best) if best else Spread({}, results.seeds)
    kept = _difference(merged, base)
    name = f"{CLEAN}: best undefended merge ({best or 'none'}) above theta_0, ACC"
    half = RECOVERED * gain.mean  # NaN without runs, and then nothing passes
    return [
        _at_least(f"{CLEAN}: fine-tunes above theta_0, ACC", gain, GAIN, "points"),
        _at_least(name, kept, half, "points"),
    ]


def _inherited(results: SuiteResults, scenario: str, attack: str) -> Gate:
    best = best_undefended(results, scenario, "task_arithmetic")
    success = results.success(scenario, best, [attack]) if best else Spread({}, results.seeds)
    name = f"{scenario}: undefended merge ({best or 'no task_arithmetic'}), ASR on {attacked_task(attack)}"
    return _at_least(name, success, INHERITED, "%")


def _at_least(name: str, spread: Spread, bound: float, unit: str) -> Gate:
    measured = spread.text() + (f" {unit}" if spread.values else "")
    wanted = "half the fine-tunes' gain" if math.isnan(bound) else f">= {bound:.1f} {unit}"
    return Gate(name, bool(spread.values) and spread.mean >= bound, measured, wanted)


def _difference(one: Spread, other: Spread) -> Spread:
    both = sorted(one.values.keys() & other.values.keys())
    return Spread({seed: one.values[seed] - other.values[seed] for seed in both}, one.seeds)
