"""Clocks that jump: the time of day while masks are learned, and times of change of files and of rewritten data."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

from mergekit_dam.config import ModelSettings
from mergekit_dam.io.calibration import load_calibration
from tests.faults.row import Row
from tests.faults.rows import judge
from tests.faults.world import World

_YEAR = 365 * 86400


def clock_jumps(world: World, trials: int) -> Row:
    """Killed under a clock that jumps, all its files dated anew, and run again under another such clock.

    Every second trial instead rewrites calibration data and sets their time of change back to what it was.
    """
    reference, hit, notes = world.reference(), 0, []
    for trial in range(trials):
        if trial % 2:
            hit += 1
            notes += _rewritten(world, trial)
            continue
        job = world.job(clock=world.random.randrange(1 << 30))
        outcome = world.run(job, kill_after=world.random.uniform(0.3, 1.0) * world.seconds[1])
        hit += outcome.code in (0, -9)
        for path in (*job.cache.rglob("*"), *job.out.rglob("*")):
            moment = time.time() + world.random.uniform(-_YEAR, _YEAR)
            os.utime(path, (moment, moment))
        later = replace(job, clock=world.random.randrange(1 << 30))
        notes += judge(world, later, outcome, [reference], reference)
    return Row(
        "clock that jumps by up to a year, files dated in the past and the future",
        trials,
        hit,
        trials - len(notes),
        "the same bytes; rewritten data are read anew even with their old time of change",
        tuple(notes),
    )


def _rewritten(world: World, trial: int) -> list[str]:
    path = world.root / "dated.jsonl"
    read = []
    for version in ("one", "two"):
        path.write_text("\n".join(json.dumps({"text": f"{version} {trial} {i}"}) for i in range(8)))
        os.utime(path, (_YEAR, _YEAR))
        read.append(_texts(path))
    path.unlink()
    fresh = {f"two {trial} {i}" for i in range(8)}
    return [] if set(read[1]) == fresh else [f"trial {trial}: {read[1][:2]} are of an older file"]


def _texts(path: Path) -> tuple[str, ...]:
    found = load_calibration(ModelSettings(calibration=str(path)), "text", num_samples=8, seed=0, task="t")
    return found.samples
