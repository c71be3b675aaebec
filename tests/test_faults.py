"""The short version of `make faults`: each row a few times, nothing lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.rows import ROWS, Row
from tests.faults.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("faults"), steps=3)


@pytest.mark.parametrize("fault", ROWS, ids=lambda row: row.__name__)
def test_nothing_is_lost(fault: Callable[[World, int], Row], world: World) -> None:
    row = fault(world, ROWS[fault][1])
    assert not row.notes and row.lost == 0 and row.tried >= ROWS[fault][1], row.notes
