"""A worker that fails half way: it dies, or hangs, as DAM_FAULT says; otherwise the package's own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.learn import worker

_VICTIM, _STEP = 1, 3  # rank, and the gradient step at which it fails


def fail_half_way(fault: str) -> None:
    """Make the third gradient step the last one."""
    real, calls = MergedModel.logit_gradients, []

    def logit_gradients(self: MergedModel, *arguments: Any, **options: Any) -> Iterator[Any]:
        calls.append(1)
        if len(calls) == _STEP and fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(calls) == _STEP and fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if len(calls) == _STEP and fault == "hang":
            hang_for_ever()
        return real(self, *arguments, **options)

    MergedModel.logit_gradients = logit_gradients  # type: ignore[method-assign]


def hang_for_ever() -> None:
    time.sleep(10_000)


if __name__ == "__main__":
    if int(os.environ["RANK"]) == _VICTIM:
        fail_half_way(os.environ["DAM_FAULT"])
    code = worker.main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
