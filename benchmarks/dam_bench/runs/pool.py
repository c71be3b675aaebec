"""Start worker processes that end with the benchmark."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from threading import Thread


def pool_of(workers: int) -> ProcessPoolExecutor:
    """Start a pool of workers that have imported the modules of a run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dam_bench.runs.run"])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End this worker when its parent is killed; it would otherwise compute all submitted jobs."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker"

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True, name="parent").start()
