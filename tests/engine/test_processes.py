"""Workers started from one process: what they raise arrives, and none of them outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergekit_dam.engine.processes import OUTCOME, WorkerError, run_workers, worker_failure, write_error
from mergekit_dam.errors import DamError

WORKER = "tests.helpers.workers"
PARENT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell turns it off for what runs in the background
from mergekit_dam.engine.processes import run_workers
run_workers("report", 2, "tests.helpers.workers")
"""
BENCHMARK = """
import os, time
from dam_bench.runs.pool import pool_of
if __name__ == "__main__":
    with pool_of(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def test_a_workers_own_error_arrives_with_its_parts() -> None:
    with pytest.raises(DamError, match="tensor x: expected finite weights, got NaN") as caught:
        run_workers("refuse", 2, WORKER)
    assert caught.value.cure == "Leave it out."


def test_any_other_error_arrives_with_its_traceback() -> None:
    with pytest.raises(WorkerError, match=r"(?s)worker 1 failed:.*workers\.py.*ZeroDivisionError: in the worker"):
        run_workers("fail", 2, WORKER)


def test_a_worker_that_is_killed_ends_the_others() -> None:
    begun = time.monotonic()
    with pytest.raises(DamError, match="worker 1: expected a worker that finishes learning, got an end by signal 9"):
        run_workers("die", 2, WORKER)
    assert time.monotonic() - begun < 100, "worker 0 would have slept for 600 seconds"


def test_a_worker_that_hangs_shows_where_it_was() -> None:
    """Beside the error of the one that waited for it in vain."""
    with pytest.raises(
        WorkerError, match=r"(?s)worker 0 failed:.*Timed out.*worker 1 did not answer .*in hang\b"
    ) as caught:
        run_workers("hang", 2, WORKER)
    assert "worker 0 did not" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("Timed out waiting 20000ms for recv operation to complete", "worker 1 did not answer for `worker_timeout`"),
        (
            "Connection closed by peer [127.0.0.1]:2",
            "worker 1: expected a worker that finishes learning, got an end by sign",
        ),
    ],
)
def test_a_killed_worker_is_the_cause_only_if_nobody_waited_for_it_in_vain(
    said: str, cause: str, tmp_path: Path
) -> None:
    """A worker that the system has stopped is killed in the end, too."""
    (tmp_path / OUTCOME).write_text('{"1": -9}')
    (tmp_path / "stack-1").write_text("")
    write_error(tmp_path, 0, RuntimeError(said))
    assert cause in str(worker_failure(tmp_path, 1))


def test_workers_that_succeed_raise_nothing() -> None:
    run_workers("succeed", 2, WORKER)


def _gone(pid: int) -> bool:
    """Whether a process has ended; one that waits to be collected has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_parent(number: int, tmp_path: Path) -> None:
    environment = {**os.environ, "REPORTS": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while len(pids := [int(p.read_text() or 0) for p in tmp_path.iterdir()]) < 2 or 0 in pids:
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.1)
    parent.send_signal(number)
    _, text = parent.communicate(timeout=100)
    assert parent.returncode != 0 and ("KeyboardInterrupt" in text) == (number == signal.SIGINT)
    while not all(_gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_a_benchmark_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(BENCHMARK)
    command = [sys.executable, str(tmp_path / "parent.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker, deadline = int(parent.stdout.readline()), time.monotonic() + 100
        assert not _gone(worker)
        parent.send_signal(signal.SIGKILL)
    while not _gone(worker):
        assert time.monotonic() < deadline, "the worker would have slept for 600 seconds"
        time.sleep(0.1)
