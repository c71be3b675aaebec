"""Write the sections of the benchmark's Markdown, each as a pure function of a suite's results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from dam_bench.tables.aggregate import SuiteResults, is_ahead
from dam_bench.tables.gates import best_undefended, check_gates, gate_table
from dam_bench.tables.results import CLEAN, Run, Spread, attacked_task, percent

_OURS = ("paper-dual", "dam")  # rows of the summary, after the hardest baseline


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table; bars inside cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def figure_names(results: SuiteResults) -> list[str]:
    """File names of the figures that a suite's results allow."""
    prefix = f"{results.suite}-{results.preset}"
    names = [f"{prefix}-acc-asr.png", f"{prefix}-asr-coefficient.png"] if results.poisoned else []
    return names + ([f"{prefix}-density.png"] if any(run.density for run in results.runs.values()) else [])


def suite_section(results: SuiteResults, figures: str) -> str:
    """Write the section of a suite, with all its tables and figures."""
    parts = [
        f"## Suite {results.suite}, preset {results.preset}",
        f"Seeds {_join(results.seeds)}; tasks {_join(results.tasks)}. {_origin(results)}",
        "### Gates",
        gate_table(check_gates(results)),
        "### Summary over scenarios",
        summary_table([results]),
    ]
    for name in figure_names(results):
        parts.append(f"![{name.removesuffix('.png').replace('-', ' ')}]({figures}/{name})")
    for scenario in results.poisoned:
        parts += _scenario(results, scenario)
    if results.has(CLEAN):
        parts += ["### All-clean merges: floors, and what a defence costs", _floors(results)]
    parts += ["### Time and memory", _cost(results), *_differences(results)]
    return "\n\n".join(parts) + "\n"


def summary_table(groups: Iterable[SuiteResults]) -> str:
    """Write the table of the hardest baseline, the hardest rival and our methods per suite.

    Numbers are means and ranges over scenarios.
    """
    rows = []
    for results in groups:
        name = f"{results.suite} ({results.preset})"
        hardest, rival = (results.hardest(results.poisoned, rivals=rivals) for rivals in (False, True))
        known = {run.method for run in results.runs.values()}
        if not hardest:
            rows.append([name, "hardest baseline: none has all scenarios, seeds and floors", "-", "-", "-", "-"])
        labels = {hardest: f"{hardest} (hardest baseline)", rival: f"{rival} (hardest rival)"}
        for method in (hardest, rival, *(ours for ours in _OURS if ours in known)):
            if method:
                rows.append([name, labels.get(method, method), *_over_scenarios(results, method)])
    header = ["suite", "method", "ACC %, mean (range) over scenarios", "excess ASR, likewise", "scenarios", "seeds"]
    return table(header, rows)


def overview_table(groups: Iterable[SuiteResults]) -> str:
    """Write the README's table: a row per suite, means over its poisoned scenarios and their seeds, in percent.

    The undefended merge is the most accurate of each scenario; the floor is the attack success of the same triggers on
    the merge of clean models by `dam`.
    """
    rows = []
    for results in groups:
        cells: list[list[float]] = []
        for name in results.poisoned:
            best = results.most_accurate(name)
            spreads = [results.floor(name, "dam")]
            for method in (best, "dam") if best else ():
                spreads += [results.accuracy(name, method), results.success(name, method)]
            if best and not any(spread.missing for spread in spreads):
                cells.append([spread.mean for spread in spreads])
        if not cells:
            continue
        floor, *means = (f"{sum(column) / len(column):.1f}" for column in zip(*cells, strict=True))
        counts = f"{_counted(len(cells), 'attack')}, {_counted(len(results.seeds), 'seed')}"
        rows.append([results.suite, *means, floor, counts])
    header = [
        "suite",
        "undefended: accuracy",
        "attack success",
        "`dam`: accuracy",
        "attack success",
        "floor",
        "mean over",
    ]
    return table(header, rows)


def _over_scenarios(results: SuiteResults, method: str) -> list[str]:
    """Cells with means over the scenarios that have the method and its floor; ranges are over scenarios, not seeds."""
    names = [name for name in results.poisoned if results.excess(name, method).values]
    cells = []
    for spreads in (
        [results.accuracy(name, method) for name in names],
        [results.excess(name, method) for name in names],
    ):
        cells.append(_range([spread.mean for spread in spreads if spread.values]) if spreads else "missing")
    counts = sorted({len(results.excess(name, method).values) for name in names}) or [0]
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    return [*cells, f"{len(names)}/{len(results.poisoned)}", f"{seeds}/{len(results.seeds)}"]


def _scenario(results: SuiteResults, scenario: str) -> list[str]:
    attacks = results.attacks_of(scenario)
    rows = []
    for method in results.methods(scenario):
        run = results.any_run(method)
        rows.append(
            [
                run.group,
                method,
                _accuracy(results, scenario, method),
                _cell(results, scenario, method, results.success(scenario, method)),
                _cell(results, scenario, method, results.transfer(scenario, method)),
                _cell(results, CLEAN, method, results.floor(scenario, method)),
                results.excess(scenario, method).text(),
                _cell(results, scenario, method, results.without_trigger(scenario, method)),
                "-"
                if run.group in ("reference", "undefended")
                else _margin_cell(results.margin_over_undefended(scenario, method)),
                _seeds(results, scenario, method),
            ]
        )
    header = ["", "method", "ACC %", "ASR % attacked", "ASR % elsewhere", "floor %", "excess ASR", "without trigger %"]
    hardest = results.hardest([scenario])
    line = "Hardest baseline: none has all seeds and floors."
    if hardest:
        base = results.score(scenario, "base")
        line = f"Hardest baseline: **{hardest}**, ACC - max(0, excess ASR) = {results.score(scenario, hardest).text()}"
        line += f" (theta_0, unmerged: {base.text()})."
    rival = results.hardest([scenario], rivals=True)
    if rival:
        line += f" Hardest rival: **{rival}**, {results.score(scenario, rival).text()}."
    areas = [[stem, results.area(scenario, stem).text()] for stem in results.curves(scenario)]
    seeds = results.seeds_of(scenario)
    fewer = (
        [f"Seeds {_join(seeds)} only; other scenarios have {_join(results.seeds)}."] if seeds != results.seeds else []
    )
    return [
        f"### Scenario {scenario}: {_join(attack.replace('=', ' = ', 1) for attack in attacks)}",
        *fewer,
        table([*header, "ahead of the front; seeds ahead", "seeds"], rows),
        line,
        table(["undefended merges over their coefficients", "area under the ACC-ASR curve %"], areas),
        _fold(f"Transfer matrix of {scenario}: trigger on each task, with counts", _matrix(results, scenario)),
        _fold(f"Clean accuracy of {scenario} per task, with counts", _accuracies(results, scenario)),
    ]


def _matrix(results: SuiteResults, scenario: str) -> str:
    """Write ASR of each attack's trigger on every task, with counts summed over seeds; the attacked task is bold."""
    rows = []
    for method in results.methods(scenario):
        runs = [results.run(scenario, method, seed) for seed in results.seeds_of(scenario)]
        for attack in results.attacks_of(scenario):
            success = [run.attack_success.get(attack, {}) for run in runs if run]
            cells = [_sum([rates[task] for rates in success if task in rates]) for task in results.tasks]
            marked = [
                f"**{c}**" if t == attacked_task(attack) else c for t, c in zip(results.tasks, cells, strict=True)
            ]
            rows.append([method, attack, *marked, _seeds(results, scenario, method)])
    return table(["method", "trigger", *results.tasks, "seeds"], rows)


def _accuracies(results: SuiteResults, scenario: str) -> str:
    rows = []
    for method in results.methods(scenario):
        runs = [results.run(scenario, method, seed) for seed in results.seeds_of(scenario)]
        cells = [_sum([r.accuracy[task] for r in runs if r and task in r.accuracy]) for task in results.tasks]
        rows.append([method, *cells, _seeds(results, scenario, method)])
    return table(["method", *results.tasks, "seeds"], rows)


def _floors(results: SuiteResults) -> str:
    """Write ACC of all-clean runs, its distance from the best undefended merge, and each attack's floor."""
    best = best_undefended(results, CLEAN)
    rows = []
    for method in results.methods(CLEAN):
        accuracy = results.accuracy(CLEAN, method)
        rows.append([method, _accuracy(results, CLEAN, method), "-"])
        if best and results.any_run(method).group != "reference":
            top = results.accuracy(CLEAN, best).values
            both = sorted(top.keys() & accuracy.values.keys())
            rows[-1][2] = Spread({s: accuracy.values[s] - top[s] for s in both}, accuracy.seeds).text()
        floors = [results.success(CLEAN, method, [attack]) for attack in results.attacks]
        rows[-1] += [_cell(results, CLEAN, method, floor) for floor in floors] + [_seeds(results, CLEAN, method)]
    against = f"ACC against {best}" if best else "ACC against the best undefended merge"
    return table(["method", "ACC %", against, *(f"floor % {attack}" for attack in results.attacks), "seeds"], rows)


def _cost(results: SuiteResults) -> str:
    """Write wall time and memory of all runs, per method and hardware."""
    groups: dict[tuple[tuple[int, int, str, float], str, str], list[Run]] = {}
    for run in results.runs.values():
        groups.setdefault((run.order, run.method, run.hardware), []).append(run)
    rows = []
    for (_, method, hardware), runs in sorted(groups.items()):
        seconds = [run.wall_s for run in runs if run.wall_s is not None]
        memory = [run.peak_bytes / 2**20 for run in runs if run.peak_bytes is not None]
        samples = sorted({run.calibration_samples for run in runs if run.calibration_samples is not None})
        cells = [_range(seconds), _range(memory, 0), _join(samples) or "-", str(len(runs)), hardware]
        rows.append([method, *cells])
    header = ["method", "wall time s", "peak memory MiB", "calibration samples per task", "runs", "hardware"]
    return table(header, rows)


def _differences(results: SuiteResults) -> list[str]:
    """Warn about every method whose runs differ in settings other than the seed."""
    lines = []
    for method in sorted({run.method for run in results.runs.values()}):
        settings = [run.settings for run in results.runs.values() if run.method == method]
        for key in sorted({key for run_settings in settings for key in run_settings} - {"seed"}):
            values = sorted({json.dumps(run_settings.get(key), sort_keys=True) for run_settings in settings})
            if len(values) > 1:
                lines.append(f"- **Not the same setting in all runs** of {method}: `{key}` is {_join(values)}.")
    return ["\n".join(lines)] if lines else []


def _origin(results: SuiteResults) -> str:
    hardware = sorted({run.hardware for run in results.runs.values()})
    versions = sorted({f"{name} {v}" for run in results.runs.values() for name, v in run.versions.items()})
    return f"Hardware: {_join(hardware)}." + (f" Versions: {_join(versions)}." if versions else "")


def _accuracy(results: SuiteResults, scenario: str, method: str) -> str:
    """Format ACC; for runs with only some tasks, the mean over these and their names."""
    spread = results.accuracy(scenario, method)
    runs = {seed: results.run(scenario, method, seed) for seed in results.seeds_of(scenario)}
    if spread.values or not any(runs.values()):
        return spread.text()
    part = {s: sum(map(percent, r.accuracy.values())) / len(r.accuracy) for s, r in runs.items() if r}
    tasks = sorted({task for run in runs.values() if run for task in run.accuracy})
    return f"{Spread(part, tuple(runs)).text()} on {_join(tasks)} alone"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _cell(results: SuiteResults, scenario: str, method: str, spread: Spread) -> str:
    """Format a spread; "-" where runs exist but do not measure it."""
    there = any(results.run(scenario, method, seed) for seed in results.seeds_of(scenario))
    return "-" if there and not spread.values else spread.text()


def _margin_cell(spread: Spread) -> str:
    seeds = sum(is_ahead(value) for value in spread.values.values())
    return f"{spread.text()}; {seeds}/{len(spread.values)}" if spread.values else spread.text()


def _seeds(results: SuiteResults, scenario: str, method: str) -> str:
    there = sum(results.run(scenario, method, seed) is not None for seed in results.seeds_of(scenario))
    return f"{there}/{len(results.seeds)}"


def _sum(counts: Sequence[tuple[int, int]]) -> str:
    hits, total = (sum(values) for values in zip(*counts, strict=True)) if counts else (0, 0)
    return f"{percent((hits, total)):.1f} ({hits}/{total})" if total else "-"


def _range(values: list[float], digits: int = 1) -> str:
    return Spread(dict(enumerate(values)), tuple(range(len(values)))).text(digits) if values else "-"


def _fold(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def _join(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)
