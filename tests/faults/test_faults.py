"""The short version of `make faults`: each row a few times, nothing lost; and the table made from the long one."""

from __future__ import annotations

import pytest

from tests.faults.inputs import ALL
from tests.faults.soak import growth
from tests.faults.suite import SUITE
from tests.faults.table import DOCUMENT, RESULTS, ROOT, render, table
from tests.faults.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("faults"), steps=3)


@pytest.mark.parametrize("name", [name for name, entry in SUITE.items() if entry.short])
def test_nothing_is_lost(name: str, world: World) -> None:
    row = SUITE[name].run(world, SUITE[name].short)
    assert not row.notes and row.lost == 0 and row.tried >= SUITE[name].short, row.notes


def test_the_committed_table_is_made_from_the_committed_results() -> None:
    assert DOCUMENT.read_text("utf-8") == render(DOCUMENT.read_text("utf-8"), table(RESULTS)), (
        "run python -m tests.faults.table"
    )


def test_nothing_was_lost_in_the_committed_results() -> None:
    import json

    facts = json.loads(RESULTS.read_text("utf-8"))
    by_name = facts["rows"]
    assert by_name and set(by_name) <= set(SUITE)
    assert all(row["lost"] == 0 and row["tried"] == row["survived"] > 0 for row in by_name.values())


def test_every_test_that_the_table_names_is_there() -> None:
    import ast

    for named in ALL.values():
        for test in named.tests:
            file, _, function = test.partition("::")
            tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text("utf-8"))
            assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, test


def test_growth_is_the_gain_along_the_line_of_least_squares() -> None:
    """A leak shows through noise, and noise does not show as a leak."""
    quiet = [{"merges": 100 + i, "kilobytes": 5000 + 300 * (-1) ** i} for i in range(40)]
    leaking = [{**reading, "kilobytes": reading["kilobytes"] + 200 * i} for i, reading in enumerate(quiet)]
    assert abs(growth(quiet, "kilobytes")) < 100 and abs(growth(leaking, "kilobytes") - 39 * 200) < 100
