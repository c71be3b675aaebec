"""Worker processes of a benchmark, which end with it."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from threading import Thread


def pool_of(workers: int) -> ProcessPoolExecutor:
    """So many workers, each of which has imported what a run needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dam_bench.runs.run"])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """A worker of a benchmark that was killed would otherwise compute all that was submitted."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker"

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True, name="parent").start()
