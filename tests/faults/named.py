"""Rows that stand for tests of the suite (`inputs`), run in one process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.faults.inputs import ALL
from tests.faults.row import Row
from tests.faults.world import World

_ROOT = Path(__file__).parents[2]


def row_of(name: str) -> Callable[[World, int], Row]:
    """The function of a row: its tests, run once; all rows that are wanted share one process of pytest."""

    def run(world: World, _: int) -> Row:
        named = ALL[name]
        wanted = [test for row in {name, *world.rows} & set(ALL) for test in ALL[row].tests]
        passed, failed = _results(world, [test for test in wanted if test not in world.verdicts])
        world.verdicts |= {test: (passed[test], failed[test]) for test in wanted if test not in world.verdicts}
        good, bad = (sum(world.verdicts[test][i] for test in named.tests) for i in (0, 1))
        missing = [test for test in named.tests if world.verdicts[test] == (0, 0)]
        notes = [test for test in named.tests if world.verdicts[test][1]] + missing
        tried = good + bad + len(missing)
        return Row(named.fault, tried, tried, good, named.outcome, tuple(notes), named.tests)

    return run


def _results(world: World, tests: Iterable[str]) -> tuple[Counter[str], Counter[str]]:
    """Cases that passed, and that failed, of each test."""
    passed, failed, wanted = Counter[str](), Counter[str](), sorted(set(tests))
    if not wanted:
        return passed, failed
    report = world.place().with_suffix(".xml")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            f"--junitxml={report}",
            "-o",
            "junit_family=xunit1",
            *(f"tests/{test}".replace("::", ".py::") for test in wanted),
        ],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        check=False,
    )
    for case in ElementTree.parse(report).iter("testcase"):
        file = Path(case.get("file", "")).relative_to("tests").with_suffix("").as_posix()
        test = f"{file}::{case.get('name', '').partition('[')[0]}"
        kinds = {child.tag for child in case}
        if not kinds & {"skipped"}:
            (failed if kinds & {"failure", "error"} else passed)[test] += 1
    return passed, failed
