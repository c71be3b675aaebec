"""Workers for tests of the launcher: they do at once what the job says, and import nothing that takes time."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from pathlib import Path

from mergekit_dam.engine.processes import JOB, dump_stacks_on_sigterm, end_with_parent, write_error
from mergekit_dam.errors import DamError


def act(order: str, rank: int, folder: Path) -> None:
    if order == "report":
        Path(os.environ["REPORTS"], f"{rank}").write_text(str(os.getpid()))
        time.sleep(600)
    if order == "succeed":
        return
    if order == "hang" and rank == 1:
        hang()
    if order == "hang":
        time.sleep(1)  # the other is on its way
        raise RuntimeError("Timed out waiting 5000ms for recv operation to complete")
    if rank == 0:  # waits for the other, as in a collective
        time.sleep(600)
    if order == "refuse":
        raise DamError("tensor x", expected="finite weights", got="NaN", cure="Leave it out.")
    if order == "fail":
        raise ZeroDivisionError("in the worker")
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    while True:
        time.sleep(600)


if __name__ == "__main__":
    here, number = Path(sys.argv[1]), int(os.environ["RANK"])
    end_with_parent(lambda: os._exit(1))
    dump_stacks_on_sigterm(here, number)
    try:
        act(pickle.loads((here / JOB).read_bytes()), number, here)
    except Exception as error:
        write_error(here, number, error)
        os._exit(1)
    os._exit(0)
