"""Several processes learn together: all of them killed, one that dies, one that hangs, one that is stopped."""

from __future__ import annotations

import time
from pathlib import Path

from tests.faults.row import Row
from tests.faults.rows import judge
from tests.faults.world import World

_PROCESSES = 2
_TIMEOUT = 20.0  # seconds that a worker may wait for another: more than their starts may lie apart
_ENDED_WITHIN = 20.0  # seconds after which no worker is left: the supervisor kills after 10


def group_killed(world: World, trials: int) -> Row:
    """kill -9 of the process that started two workers, at a random moment, then the same command again."""
    reference, hit, notes = world.reference(processes=_PROCESSES), 0, []
    for trial in range(trials):
        job = world.job(processes=_PROCESSES, environment=_own_folder(world))
        outcome = world.run(job, kill_after=world.random.uniform(0.2, 1.0) * world.seconds[_PROCESSES])
        hit += outcome.code == -9
        left = _left(job.environment["TMPDIR"])
        found = judge(world, job, outcome, [reference], reference)
        notes += found or ([f"trial {trial}: processes {left} were left"] if left else [])
    return Row(
        "kill -9 while two processes learn together",
        trials,
        hit,
        trials - len(notes),
        "the workers end, too; the next run goes on and gives the same bytes",
        tuple(notes),
    )


def worker_dies(world: World, trials: int) -> Row:
    """One of two workers is killed half way (what a lack of memory does)."""
    return _failing(
        world,
        trials,
        "die",
        1,
        ["expected a worker that finishes learning, got an end by signal 9"],
        "a worker that dies while masks are learned",
        "an error that names the worker and the signal; the others end",
    )


def worker_hangs(world: World, trials: int) -> Row:
    """One of two workers hangs half way, or is stopped by the system."""
    return _failing(
        world,
        trials,
        "hang",
        2,
        ["worker 1 did not answer for `worker_timeout` seconds", "in hang_for_ever"],
        "a worker that hangs while masks are learned",
        "after worker_timeout an error with the traceback of the worker that hangs; all end",
    )


def worker_stopped(world: World, trials: int) -> Row:
    """One of two workers is stopped by the system half way (SIGSTOP), so that it cannot even say where it is."""
    return _failing(
        world,
        trials,
        "stop",
        2,
        ["worker 1 did not answer for `worker_timeout` seconds"],
        "a worker that the system stops while masks are learned",
        "after worker_timeout an error that names it; all end",
    )


def _failing(world: World, trials: int, fault: str, code: int, words: list[str], what: str, outcome: str) -> Row:
    reference, hit, notes = world.reference(processes=_PROCESSES), 0, []
    for trial in range(trials):
        job = world.job(
            processes=_PROCESSES,
            worker="tests.faults.worker",
            environment={"DAM_FAULT": fault, **_own_folder(world)},
        )
        job.recipe["parameters"]["constants"] = world.constants(worker_timeout=_TIMEOUT)
        found = world.run(job)
        said = found.code == code and all(word in found.log for word in words)
        hit += said
        left = _left(job.environment["TMPDIR"])
        sound = world.job(processes=_PROCESSES, cache=job.cache, out=job.out, log=job.log)
        lost = judge(world, sound, found, [reference], reference)
        if not said or left:
            lost = [f"trial {trial}: exit {found.code}, {left} left: {found.log[-600:]}"]
        notes += lost
    return Row(what, trials, hit, trials - len(notes), f"{outcome}; the next run goes on", tuple(notes))


def _own_folder(world: World) -> dict[str, str]:
    """A folder for temporary files, whose name tells a job's workers apart from all other processes."""
    folder = world.place()
    folder.mkdir()
    return {"TMPDIR": str(folder)}


def _left(name: str) -> list[int]:
    """Processes with `name` in their command line, once they had time to end."""
    deadline = time.monotonic() + _ENDED_WITHIN
    while found := [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if name in _command(path)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return found


def _command(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""
