"""Many merges in one process, and at once: no growth of memory, files or threads, and the same bytes."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.faults.child import Job, merge_here
from tests.faults.row import Row
from tests.faults.world import World, content

THREADS = 8
_WARM = 20  # merges before the first reading: the method keeps the masks of the last 16, and libraries' caches fill
_KILOBYTES = 64.0  # growth per merge that counts as none: the allocator's; plain task_arithmetic grows by 160 to 330


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
    """In a child: merge again and again, and write the usage after the first few and at the end."""
    os.environ["MERGEKIT_DAM_CACHE"] = str(job.cache)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr = sys.stdout = job.log.open("w", encoding="utf-8")
    readings = []
    for merge in range(merges):
        merge_here(job)
        if merge + 1 in (_WARM, merges):
            readings.append(vars(Usage.now()) | {"merges": merge + 1})
    report.write_text(json.dumps(readings))


def one_process(world: World, merges: int) -> Row:
    """Merges with ready masks in one process, more than 20 of them."""
    reference, job = world.reference(), world.job(cache=world.learned())
    merges = max(merges, _WARM + 6)
    report = world.root / "usage.json"
    process = world.context.Process(target=measure, args=(job, merges, report))
    process.start()
    process.join()
    notes, said = [], "the process ended early"
    if process.exitcode == 0:
        first, last = json.loads(report.read_text())
        done = last["merges"]
        rate = (last["kilobytes"] - first["kilobytes"]) / (done - first["merges"])
        files, threads = (last[key] - first[key] for key in ("files", "threads"))
        said = f"per merge {rate:+.0f} kB; {files:+d} files and {threads:+d} threads in all"
        if rate > _KILOBYTES or files > 0 or threads > 0 or content(job.out) != reference:
            notes.append(said)
    else:
        done = merges
        notes.append(f"exit {process.exitcode}: {job.log.read_text('utf-8')[-300:]}")
    return Row("merges in one process", done, done, done if not notes else 0, said, tuple(notes))


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
        f"merges from {THREADS} threads at once", tried, tried, max(0, tried - len(notes)),
        "the same bytes as one by one", tuple(notes),
    )  # fmt: skip


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
    """The real command mergekit-yaml, each run a process of its own."""
    reference, notes = world.reference(), []
    for _ in range(runs):
        job = world.job(cache=world.learned())
        job.out.parent.mkdir(parents=True)
        recipe = job.out.parent / "dam.yml"
        recipe.write_text(yaml.safe_dump(job.recipe))
        done = subprocess.run(
            [Path(sys.executable).parent / "mergekit-yaml", recipe, job.out, "--out-shard-size", "8000", "--quiet"],
            env={**os.environ, "MERGEKIT_DAM_CACHE": str(job.cache), "PYTHONHASHSEED": str(len(notes))},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode or content(job.out) != reference:
            notes.append(f"exit {done.returncode}: {done.stderr[-300:]}")
        shutil.rmtree(job.out.parent)
    return Row("mergekit-yaml, run again", runs, runs, runs - len(notes), "the same bytes every time", tuple(notes))
