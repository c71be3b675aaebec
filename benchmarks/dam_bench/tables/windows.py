"""The study of windows of blocks as a Markdown table: accuracy and attack success by what is learned at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dam_bench.tables.aggregate import SuiteResults
from dam_bench.tables.results import CLEAN, Spread
from dam_bench.tables.sections import table

_WINDOW = re.compile(r"^dam(?:\(window=(\d+)\))?$")
_HEADER = ["suite", "scenario", "window", "ACC %", "ASR % attacked", "floor %", "seconds", "seeds"]


def window_section(groups: Iterable[SuiteResults]) -> str:
    """Write the section of RESULTS.md: a row per suite, scenario and window, the whole model first.

    The floor is that of the same window; seconds are of machines that did other work as well.
    """
    rows = []
    for results in groups:
        for scenario in [CLEAN, *results.poisoned] if results.has(CLEAN) else results.poisoned:
            for size, method in sorted(_windows(results, scenario), reverse=True):
                success = floor = "-"
                if scenario != CLEAN:
                    success = results.success(scenario, method).text()
                    floor = results.floor(scenario, method).text()
                seconds = results.spread(scenario, method, lambda run: run.wall_s)
                cells = [results.accuracy(scenario, method).text(), success, floor, _whole(seconds)]
                seeds = ", ".join(map(str, results.accuracy(scenario, method).values))
                rows.append([results.suite, scenario, "all" if size == _ALL else str(size), *cells, seeds])
    return f"## Study: windows of blocks\n\n{table(_HEADER, rows)}\n"


_ALL = 10**6


def _windows(results: SuiteResults, scenario: str) -> list[tuple[int, str]]:
    """Size of the window and method of each row; the whole model counts as the largest."""
    found = [(_WINDOW.match(method), method) for method in results.methods(scenario)]
    return [(int(match[1] or _ALL), method) for match, method in found if match is not None]


def _whole(seconds: Spread) -> str:
    return f"{seconds.mean:.0f}" if seconds.values else "-"
