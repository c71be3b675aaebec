"""All rows in the order of the table, with the number of trials in `make faults` and in `make test`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults import clocks, damage, fuzz, groups, publishing, races, rows, soak
from tests.faults.full import disk_full
from tests.faults.inputs import ALL
from tests.faults.named import row_of
from tests.faults.row import Row
from tests.faults.world import World


@dataclass(frozen=True)
class Entry:
    """A row's function, its trials in the long run, and in the short one (0: other tests do it).

    The long run does `piece` of them at a time (0: all) and keeps what it has counted after each, so that little is
    lost when it is stopped.
    """

    run: Callable[[World, int], Row]
    trials: int
    short: int
    piece: int = 0

    def pieces(self, trials: int) -> list[int]:
        """Numbers of trials that make up `trials`."""
        size = self.piece or trials
        return [size] * (trials // size) + ([trials % size] if trials % size else [])


SUITE: dict[str, Entry] = {
    "learn_killed": Entry(rows.learn_killed, 20, 1, piece=4),
    "group_killed": Entry(groups.group_killed, 4, 0, piece=1),
    "merge_killed": Entry(rows.merge_killed, 16, 1, piece=4),
    "report_killed": Entry(publishing.report_killed, 24, 1, piece=8),
    "push_killed": Entry(publishing.push_killed, 24, 1, piece=8),
    "worker_dies": Entry(groups.worker_dies, 2, 0, piece=1),
    "worker_hangs": Entry(groups.worker_hangs, 2, 0, piece=1),
    "worker_stopped": Entry(groups.worker_stopped, 1, 0),
    "clock_jumps": Entry(clocks.clock_jumps, 12, 2, piece=4),
    "disk_full": Entry(disk_full, 16, 2, piece=4),
    "artefact_killed": Entry(rows.artefact_killed, 100, 5),
    "artefact_damaged": Entry(rows.artefact_damaged, 1000, 50),
    "snapshot_damaged": Entry(damage.snapshot_damaged, 200, 10),
    "model_changed": Entry(rows.model_changed, 3, 1),
    "data_changed": Entry(rows.data_changed, 300, 30),
    "one_cache_twice": Entry(races.one_cache_twice, 5, 1),
    "one_output_twice": Entry(races.one_output_twice, 8, 1),
    "fuzz_weights": Entry(fuzz.fuzz_weights, 3500, 0),
    "fuzz_data": Entry(fuzz.fuzz_data, 600, 0),
    **{name: Entry(row_of(name), 1, 0) for name in ALL},
    "one_process": Entry(soak.one_process, 500, 12),
    "at_once": Entry(soak.at_once, 4, 1),
    "commands": Entry(soak.commands, 100, 0, piece=20),
}
