"""No space left: a small disk of its own (tmpfs) where this may be mounted, and a limit on the size of files."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.faults.row import Row
from tests.faults.rows import judge
from tests.faults.world import World

_ROOM = "64m"  # what a merge of the small models never needs


def disk_full(world: World, trials: int) -> Row:
    """The disk is full at a random moment, while learning or merging; then there is space again."""
    reference, hit, notes, disks = world.reference(), 0, [], 0
    for trial in range(trials):
        cache = world.learned() if trial % 4 == 3 else None
        with _small_disk(world.place(), int(2 ** world.random.uniform(12, 19))) as disk:
            if disk is not None and trial % 2 == 0:
                job = replace(world.job(cache=cache, place=disk / "trial"), log=disk.with_suffix(".log"))
                outcome = world.run(job)
                _mount("remount,", _ROOM, disk)
                disks += 1
            else:
                job = world.job(cache=cache)
                outcome = world.run(replace(job, file_limit=int(2 ** world.random.uniform(8, 17))))
            hit += outcome.code != 0
            notes += judge(world, job, outcome, [reference], reference)
    how = "a tmpfs, and files that may not grow" if disks else "files may not grow beyond a random size"
    return Row(
        f"no space left ({how})",
        trials,
        hit,
        trials - len(notes),
        "an error; nothing half written under a final name; the next run completes it",
        tuple(notes),
    )


def _mount(how: str, size: str, at: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", str(at)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@contextmanager
def _small_disk(at: Path, size: int) -> Iterator[Path | None]:
    """A disk of `size` bytes, or None where we may not mount one."""
    at.mkdir(parents=True)
    if not _mount("", str(size), at):
        yield None
        return
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)
