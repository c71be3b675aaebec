"""Many merges in one process, and at once: no growth of memory, files or threads, and the same bytes."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.faults.child import Job, merge_here
from tests.faults.row import Row
from tests.faults.world import World, content

THREADS = 8
_READINGS = 40  # in the second half of a soak
_GROWTH = 4096.0  # kB over the whole second half that count as none; one set of masks per merge would be ten times that


@dataclass(frozen=True)
class Usage:
    """Resident memory of its own in kB, open files and threads of this process, as the kernel counts them."""

    kilobytes: float
    files: int
    threads: int

    @classmethod
    def now(cls) -> Usage:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that only what is held counts
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        kilobytes = float(status["RssAnon"].split()[0])
        return cls(kilobytes, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))


def measure(job: Job, merges: int, report: Path) -> None:
    """In a child: merge again and again, and write the usage of the second half, at regular distances."""
    os.environ["MERGEKIT_DAM_CACHE"] = str(job.cache)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr = sys.stdout = job.log.open("w", encoding="utf-8")
    readings, distance = [], max(1, merges // 2 // _READINGS)
    for merge in range(1, merges + 1):
        merge_here(job)
        if merge > merges // 2 and merge % distance == 0:
            readings.append(vars(Usage.now()) | {"merges": merge})
    report.write_text(json.dumps(readings))


def slope(xs: list[float], ys: list[float]) -> float:
    """Of the line of least squares."""
    x, y = (sum(values) / len(values) for values in (xs, ys))
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def growth(readings: list[dict[str, Any]], key: str) -> float:
    """What the line of least squares through the readings gains from the first to the last."""
    xs = [float(reading["merges"]) for reading in readings]
    return slope(xs, [float(reading[key]) for reading in readings]) * (xs[-1] - xs[0])


def one_process(world: World, merges: int) -> Row:
    """Merges with ready masks in one process; the first half warms up caches, the second is judged."""
    reference, job = world.reference(), world.job(cache=world.learned())
    report = world.root / "usage.json"
    process = world.context.Process(target=measure, args=(job, merges, report))
    process.start()
    process.join()
    notes, said = [], "the process ended early"
    if process.exitcode == 0:
        readings = json.loads(report.read_text())
        grown = {key: growth(readings, key) for key in ("kilobytes", "files", "threads")}
        said = (
            f"in the last {merges - merges // 2} merges, by slope: {grown['kilobytes']:+,.0f} kB of "
            f"{readings[-1]['kilobytes']:,.0f}, {grown['files']:+.0f} files, {grown['threads']:+.0f} threads"
        )
        if grown["kilobytes"] > _GROWTH or grown["files"] >= 0.5 or grown["threads"] >= 0.5:
            notes.append(said)
        if content(job.out) != reference:
            notes.append("the last merge has other bytes")
    else:
        notes.append(f"exit {process.exitcode}: {job.log.read_text('utf-8')[-300:]}")
    return Row("merges in one process", merges, merges, merges if not notes else 0, said, tuple(notes))


def at_once(world: World, rounds: int) -> Row:
    """Eight threads merge at once, with two different sets of masks, each into a directory of its own."""
    references = [world.reference(0), world.reference(1)]
    caches = world.root / "cache-threads"
    for seed in (0, 1):
        shutil.copytree(world.learned(seed), caches, dirs_exist_ok=True)
    jobs = [world.job(seed=i % 2, cache=caches) for i in range(THREADS * rounds)]
    report = world.root / "threads.json"
    process = world.context.Process(target=_threads, args=(jobs, report))
    process.start()
    process.join()
    failed = json.loads(report.read_text()) if report.is_file() else ["the process ended early"]
    notes = [*failed, *(str(job.out) for i, job in enumerate(jobs) if content(job.out) != references[i % 2])]
    tried = len(jobs)
    return Row(
        f"merges from {THREADS} threads at once",
        tried,
        tried,
        max(0, tried - len(notes)),
        "the same bytes as one by one",
        tuple(notes),
    )


def _threads(jobs: list[Job], report: Path) -> None:
    os.environ["MERGEKIT_DAM_CACHE"] = str(jobs[0].cache)
    sys.stderr = sys.stdout = (jobs[0].cache / "log").open("w", encoding="utf-8")

    def run(job: Job) -> str | None:
        try:
            merge_here(job)
        except Exception as error:
            return f"{job.out}: {type(error).__name__}: {error}"
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        report.write_text(json.dumps([said for said in pool.map(run, jobs) if said]))


def commands(world: World, runs: int) -> Row:
    """The real command mergekit-yaml, each run a process of its own: bytes, peak memory, and what it leaves behind."""
    reference, notes, readings = world.reference(), [], []
    cache, temporary = world.learned(), world.place()
    temporary.mkdir()
    before = _files(cache)
    for run in range(runs):
        job = world.job(cache=cache)
        job.out.parent.mkdir(parents=True)
        recipe = job.out.parent / "dam.yml"
        recipe.write_text(yaml.safe_dump(job.recipe))
        command = [
            Path(sys.executable).parent / "mergekit-yaml",
            recipe,
            job.out,
            "--out-shard-size",
            "8000",
            "--quiet",
        ]
        variables = {"MERGEKIT_DAM_CACHE": str(job.cache), "PYTHONHASHSEED": str(run), "TMPDIR": str(temporary)}
        code, kilobytes, said = _command(command, {**os.environ, **variables}, job.log)
        readings.append({"merges": run, "kilobytes": kilobytes})
        if code or content(job.out) != reference:
            notes.append(f"run {run}: exit {code}: {said[-300:]}")
        shutil.rmtree(job.out.parent)
    left = [*temporary.iterdir(), *(_files(cache) - before)]
    if left:
        notes.append(f"left behind: {left[:5]}")
    last = readings[len(readings) // 2 :]
    grown = growth(last, "kilobytes") if len(last) > 1 else 0.0
    if grown > _GROWTH and len(last) > 5:
        notes.append(f"peak memory grew by {grown:.0f} kB")
    return Row(
        "mergekit-yaml, run again and again",
        runs,
        runs,
        max(0, runs - len(notes)),
        f"the same bytes, and nothing left behind; peak memory {readings[-1]['kilobytes'] / 1024:.0f} MB, by slope "
        f"{grown / 1024:+.1f} MB in the second half of a series",
        tuple(notes),
    )


def _command(command: list[Any], variables: dict[str, str], log: Path) -> tuple[int, int, str]:
    """Exit code, peak resident memory in kB, and what it said."""
    with log.open("wb") as said:
        # spawned by hand: only wait4 tells the memory of one child
        actions = [(os.POSIX_SPAWN_DUP2, said.fileno(), 1), (os.POSIX_SPAWN_DUP2, said.fileno(), 2)]
        child = os.posix_spawn(str(command[0]), list(map(str, command)), variables, file_actions=actions)
        _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss, log.read_text("utf-8", "replace")


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}
