"""Run a job in worker processes on this machine; they end when the process that started them ends.

The parent starts one supervisor (torch's elastic agent, `supervisor.py`), and the supervisor starts the workers. All of
them hold the read end of one pipe: when the parent ends, for whatever reason, the pipe closes and they end, too. A
worker that fails writes its error into the job's folder. When a worker dies or hangs, all workers fail; a worker that
hangs gets SIGTERM and writes its threads' stacks. Every one of these processes imports this module, so it uses the
standard library only.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

from mergekit_dam.errors import DamError

JOB, OUTCOME = "job", "outcome.json"
WORKER = "mergekit_dam.learn.worker"
_STACK = "stack-"
_GRACE = 15.0  # seconds for the supervisor to end the workers; after 10 it kills workers that still run
_TIMEOUT = re.compile("timed out|wait timeout|socket timeout", re.IGNORECASE)  # messages of gloo and of torch
_TERMINATED = -15  # exit code of a worker that the supervisor ended by SIGTERM


@dataclass(frozen=True)
class Job:
    """The masks that the workers learn.

    Attributes:
        plan: a `Plan`.
        folder: folder of the artefact, locked by the parent.
        description: JSON of all that the masks depend on.
        inputs: a `Checkpoint` per model, in its state when its content was hashed.
        quiet: no progress bar.
    """

    plan: Any
    folder: Path
    description: dict[str, Any]
    inputs: tuple[Any, ...]
    quiet: bool


class WorkerError(RuntimeError):
    """A worker raised an unexpected exception; the text holds its traceback."""


def run_workers(job: Any, count: int, worker: str = WORKER) -> None:
    """Run a job in `count` workers, and wait for its end.

    Args:
        job: a `Job`, or any object that `worker` expects; passed as a pickle in a folder that only this user can enter.
        count: number of worker processes on this machine.
        worker: name of the module that each worker runs.

    Raises:
        DamError: raised by a worker, or made for a worker that was killed.
        WorkerError: a worker raised any other exception.
    """
    with TemporaryDirectory(prefix="mergekit-dam-") as name:
        folder = Path(name)
        (folder / JOB).write_bytes(pickle.dumps(job))
        command = [sys.executable, "-m", "mergekit_dam.engine.supervisor", worker, name, str(count)]
        threads = str(max(1, (os.cpu_count() or 1) // count))
        environment = {"OMP_NUM_THREADS": threads, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10", **os.environ}
        # a session of its own: Ctrl-C reaches the parent only, which then ends supervisor and workers in order
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
        try:
            process.wait()
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
        if process.returncode != 0:
            raise worker_failure(folder, process.returncode)


def write_error(folder: Path, rank: int, error: BaseException) -> None:
    """Write a worker's error into the job's folder for the parent; a DamError keeps its parts."""
    ours = isinstance(error, DamError)
    parts = {k: getattr(error, k) for k in ("subject", "expected", "got", "cure")} if ours else None
    text = "".join(traceback.format_exception(error))
    # monotonic: the workers share one machine, and unlike the time of day this clock never jumps
    content = {"time": time.monotonic(), "rank": rank, "parts": parts, "traceback": text}
    temporary = folder / f".error-{rank}"
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(folder / f"error-{rank}.json")


def dump_stacks_on_sigterm(folder: Path, rank: int) -> None:
    """Make this process write its threads' stacks on SIGTERM, even if it hangs in a call of C."""
    if hasattr(faulthandler, "register"):
        # the file stays open until the process ends
        file = (folder / f"{_STACK}{rank}").open("w", encoding="utf-8")
        faulthandler.register(signal.SIGTERM, file=file, all_threads=True, chain=True)


def end_with_parent(end: Callable[[], object]) -> None:
    """Call `end` from a thread as soon as the parent's pipe, this process's standard input, is closed."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        end()

    Thread(target=watch, daemon=True, name="parent").start()


def worker_failure(folder: Path, code: int) -> Exception:
    """Return the error that explains why a job failed: a worker's kill, else the first error of a worker.

    A killed worker breaks connections, so it explains the errors of all other workers. If the first error is a timeout,
    the kill came later: a worker hung or was stopped, did not end on SIGTERM, and was killed for that.

    Args:
        folder: folder of the job.
        code: exit code of the supervisor.
    """
    outcome = folder / OUTCOME
    codes: dict[str, int] = json.loads(outcome.read_text("utf-8")) if outcome.is_file() else {}
    killed = {rank: -c for rank, c in codes.items() if c < 0 and c != _TERMINATED}
    errors = [json.loads(path.read_text("utf-8")) for path in folder.glob("error-*.json")]
    first = min(errors, key=lambda error: float(error["time"]), default=None)
    timed_out = first is not None and first["parts"] is None and _TIMEOUT.search(first["traceback"]) is not None
    if killed and not timed_out:
        rank, number = next(iter(killed.items()))
        return DamError(
            f"worker {rank}",
            expected="a worker that finishes learning",
            got=f"an end by signal {number}",
            cure="Signal 9 is most often a lack of memory: use fewer processes or smaller batches, and run the command "
            "again; it resumes from the last snapshot.",
        )
    if first is None:
        return WorkerError(f"the workers ended without an error message (exit code {code}, by rank {codes})")
    if first["parts"] is not None:
        parts = dict(first["parts"])
        return DamError(parts.pop("subject"), **parts)
    text = f"worker {first['rank']} failed:\n{first['traceback']}"
    if timed_out:
        failed = {int(error["rank"]) for error in errors}
        stacks = {int(path.name.removeprefix(_STACK)): path.read_text("utf-8") for path in folder.glob(f"{_STACK}*")}
        for silent in sorted(set(stacks) - failed):
            text += f"\nworker {silent} did not answer for `worker_timeout` seconds; "
            text += f"it was at:\n{stacks[silent]}" if stacks[silent] else "it did not end on SIGTERM either."
    return WorkerError(text)
