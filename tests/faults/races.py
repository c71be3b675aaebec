"""Two runs at once: on one cache, and into one output directory."""

from __future__ import annotations

from tests.faults.row import Row
from tests.faults.world import World, content


def one_cache_twice(world: World, trials: int) -> Row:
    """The same merge started twice at once, on one cache, into two directories."""
    reference, notes = world.reference(), []
    for trial in range(trials):
        first = world.job()
        second = world.job(cache=first.cache)
        processes = [world.start(first), world.start(second)]
        for process in processes:
            process.join()
        if [process.exitcode for process in processes] != [0, 0] or any(
            content(job.out) != reference for job in (first, second)
        ):
            notes.append(f"trial {trial}: exits {[p.exitcode for p in processes]}, or other bytes")
    return Row(
        "two runs at once on one cache",
        trials,
        trials,
        trials - len(notes),
        "the second waits, learns nothing, and both give the same bytes",
        tuple(notes),
    )


def one_output_twice(world: World, trials: int) -> Row:
    """Two different merges started at once into one directory."""
    references, hit, notes = [world.reference(0), world.reference(1)], 0, []
    for trial in range(trials):
        first = world.job(cache=world.learned(0))
        second = world.job(seed=1, cache=world.learned(1), out=first.out)
        processes = [world.start(first), world.start(second)]
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        log = second.log.read_text("utf-8") + first.log.read_text("utf-8")
        refused = (
            sorted(map(str, codes)) == ["0", "1"] and "no other merge that writes there, got a running merge" in log
        )
        hit += refused
        # both may pass if one ended before the other began
        if not (refused or codes == [0, 0]) or content(first.out) not in references:
            notes.append(f"trial {trial}: exits {codes}: {log[-200:]}")
    return Row(
        "two runs at once into one output directory",
        trials,
        hit,
        trials - len(notes),
        "one is refused by name; the directory holds the other's result, whole",
        tuple(notes),
    )
