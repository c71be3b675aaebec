"""All rows in the order of the table, with the number of trials in `make faults` and in `make test`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults import races, rows, soak
from tests.faults.fuzz import fuzz
from tests.faults.row import Row
from tests.faults.world import World


@dataclass(frozen=True)
class Entry:
    """A row's function, its trials in the long run, and in the short one (0: other tests do it)."""

    run: Callable[[World, int], Row]
    trials: int
    short: int


SUITE: dict[str, Entry] = {
    "learn_killed": Entry(rows.learn_killed, 40, 2),
    "merge_killed": Entry(rows.merge_killed, 30, 2),
    "disk_full": Entry(rows.disk_full, 16, 2),
    "artefact_killed": Entry(rows.artefact_killed, 100, 5),
    "artefact_damaged": Entry(rows.artefact_damaged, 1000, 50),
    "model_changed": Entry(rows.model_changed, 3, 1),
    "data_changed": Entry(rows.data_changed, 300, 30),
    "one_cache_twice": Entry(races.one_cache_twice, 5, 1),
    "one_output_twice": Entry(races.one_output_twice, 8, 2),
    "fuzz": Entry(fuzz, 1300, 0),
    "one_process": Entry(soak.one_process, 60, 26),
    "at_once": Entry(soak.at_once, 2, 1),
    "commands": Entry(soak.commands, 2, 0),
}
