"""Worker processes on this machine, started by the process that wants the masks and ended with it.

The parent starts one supervisor (torch's elastic agent, `supervisor.py`), the supervisor the workers. All of them
hold the read end of one pipe: when the parent ends, for whatever reason, the pipe is closed and they end, too. A
worker that fails leaves its error in the job's folder; a worker that dies or hangs makes the others fail. One that
hangs is told to end, and leaves where it was. Standard library only: every one of these processes imports this module,
and torch only where it needs it.
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
_GRACE = 15.0  # seconds in which the supervisor ends the workers; it kills those that do not listen after 10
_WAITED = re.compile("timed out|wait timeout|socket timeout", re.IGNORECASE)  # in the words of gloo and of torch
_ENDED_BY_US = -15  # what the supervisor ends workers with


@dataclass(frozen=True)
class Job:
    """What the workers learn.

    Attributes:
        plan: a `Plan`.
        folder: of the artefact, locked by the parent.
        description: what the masks depend on, as JSON.
        inputs: a `Checkpoint` per model, as it was when its content was hashed.
        quiet: no progress bar.
    """

    plan: Any
    folder: Path
    description: dict[str, Any]
    inputs: tuple[Any, ...]
    quiet: bool


class WorkerError(RuntimeError):
    """A worker failed in a way that no setting cures; the text holds its traceback."""


def run_workers(job: Any, count: int, worker: str = WORKER) -> None:
    """Have `count` workers do the job, and wait.

    Args:
        job: what to do, e.g. a `Job`; it is handed over as a pickle in a folder that only this user can enter.
        count: processes on this machine.
        worker: the module that the workers run.

    Raises:
        DamError: as a worker raised it, or for a worker that was killed.
        WorkerError: any other exception of a worker.
    """
    with TemporaryDirectory(prefix="mergekit-dam-") as name:
        folder = Path(name)
        (folder / JOB).write_bytes(pickle.dumps(job))
        command = [sys.executable, "-m", "mergekit_dam.engine.supervisor", worker, name, str(count)]
        threads = str(max(1, (os.cpu_count() or 1) // count))
        environment = {"OMP_NUM_THREADS": threads, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10", **os.environ}
        # a session of its own: Ctrl-C reaches the parent alone, which then ends the others in order
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
            raise cause_of(folder, process.returncode)


def record_error(folder: Path, rank: int, error: BaseException) -> None:
    """Leave an error for the parent. A DamError keeps its parts."""
    parts = {k: getattr(error, k) for k in ("subject", "expected", "got", "cure")} if _is_ours(error) else None
    text = "".join(traceback.format_exception(error))
    # of one machine, and unlike the time of day it never jumps
    found = {"time": time.monotonic(), "rank": rank, "parts": parts, "traceback": text}
    temporary = folder / f".error-{rank}"
    temporary.write_text(json.dumps(found), encoding="utf-8")
    temporary.replace(folder / f"error-{rank}.json")


def show_where_it_hangs(folder: Path, rank: int) -> None:
    """Have this process leave its threads' stacks when it is told to end, even if it hangs in a call of C."""
    if hasattr(faulthandler, "register"):
        # the file stays open for as long as the process lives
        file = (folder / f"{_STACK}{rank}").open("w", encoding="utf-8")
        faulthandler.register(signal.SIGTERM, file=file, all_threads=True, chain=True)


def end_with_parent(end: Callable[[], object]) -> None:
    """Call `end` from a thread as soon as the parent's pipe, our standard input, is closed."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        end()

    Thread(target=watch, daemon=True, name="parent").start()


def _is_ours(error: BaseException) -> bool:
    return isinstance(error, DamError)


def cause_of(folder: Path, code: int) -> Exception:
    """The error that came first; a worker that was killed explains the errors of those whose connection broke.

    Those of workers that waited in vain it does not explain: then it hung or was stopped, and was killed at the end,
    since it did not listen.
    """
    outcome = folder / OUTCOME
    codes: dict[str, int] = json.loads(outcome.read_text("utf-8")) if outcome.is_file() else {}
    killed = {rank: -c for rank, c in codes.items() if c < 0 and c != _ENDED_BY_US}
    errors = [json.loads(path.read_text("utf-8")) for path in folder.glob("error-*.json")]
    first = min(errors, key=lambda error: float(error["time"]), default=None)
    waited = first is not None and first["parts"] is None and _WAITED.search(first["traceback"]) is not None
    if killed and not waited:
        rank, number = next(iter(killed.items()))
        return DamError(
            f"worker {rank}",
            expected="one that learns to the end",
            got=f"an end by signal {number}",
            cure="Signal 9 is most often a lack of memory: take fewer processes or smaller batches, and run it again, "
            "it goes on from its last snapshot.",
        )
    if first is None:
        return WorkerError(f"the workers ended without a word (exit code {code}, by rank {codes})")
    if first["parts"] is not None:
        parts = dict(first["parts"])
        return DamError(parts.pop("subject"), **parts)
    told = f"worker {first['rank']} failed:\n{first['traceback']}"
    if waited:
        spoke = {int(error["rank"]) for error in errors}
        stacks = {int(path.name.removeprefix(_STACK)): path.read_text("utf-8") for path in folder.glob(f"{_STACK}*")}
        for silent in sorted(set(stacks) - spoke):
            told += f"\nworker {silent} did not answer for `worker_timeout` seconds; "
            told += f"it was at:\n{stacks[silent]}" if stacks[silent] else "nor did it end when it was told to."
    return WorkerError(told)
