"""What runs in a process that will be killed: a merge as mergekit-yaml makes it, a report, a push, or endless writing.

The forkserver imports this module once, so that a child starts in milliseconds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import contextlib
import random
import resource
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 (imported for the forkserver)
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from tqdm import tqdm

from mergekit_dam.artifact.masks_file import load, save
from mergekit_dam.errors import DamError
from mergekit_dam.learn import run
from mergekit_dam.plugin.method import register_dam
from mergekit_dam.publish.push import plan_push, push
from mergekit_dam.publish.report import write_report

with contextlib.suppress(ImportError):
    import mergekit_dam.publish.figures  # noqa: F401 (for the forkserver, too)
tqdm.set_lock(threading.RLock())  # its default is a semaphore of the system, which a killed process leaves behind


@dataclass(frozen=True)
class Job:
    """One merge.

    Attributes:
        recipe: of mergekit.
        out: output directory.
        cache: of learned masks.
        log: file for standard error.
        file_limit: bytes that a file may have (RLIMIT_FSIZE: what a full disk is to one file), or None.
        clock: seed of a clock that jumps by up to a year with every reading, or None for a sound one.
        worker: module that the worker processes run in place of the package's own.
        environment: variables that are set.
        options: of mergekit.
    """

    recipe: dict[str, Any]
    out: Path
    cache: Path
    log: Path
    file_limit: int | None = None
    clock: int | None = None
    worker: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def merge(job: Job) -> None:
    """Merge; exit code 1 and one line in the log for an error that names itself, 2 and its text for any other."""
    os.environ |= {"MERGEKIT_DAM_CACHE": str(job.cache), **job.environment}
    tempfile.tempdir = None  # TMPDIR may be another one now
    job.log.parent.mkdir(parents=True, exist_ok=True)
    if job.clock is not None:
        _jump(random.Random(job.clock))
    if job.worker is not None:
        run.run_workers = partial(run.run_workers, worker=job.worker)
    with job.log.open("w", encoding="utf-8", buffering=1) as log:
        sys.stderr = sys.stdout = log
        if job.file_limit is not None:  # the log grows, too, but Python ignores SIGXFSZ and the log is short
            resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_limit, resource.RLIM_INFINITY))
        try:
            merge_here(job)
        except DamError as error:
            _leave(1, str(error))
        except Exception as error:
            _leave(2, f"{type(error).__name__}: {error}")


def merge_here(job: Job) -> None:
    """The merge alone, in the caller's process."""
    register_dam()
    source = yaml.safe_dump(job.recipe)
    config = MergeConfiguration.model_validate(yaml.safe_load(source))
    run_merge(config, str(job.out), MergeOptions(quiet=True, **job.options), config_source=source)


def report(out: Path) -> None:
    """The report of a finished merge, anew."""
    write_report(out)


def send(out: Path, name: str, hub: str, token: str) -> None:
    """Push a finished merge to a Hub on this machine, as `mergekit-dam push` does."""
    import huggingface_hub
    from huggingface_hub import constants

    os.environ["HF_TOKEN"] = token
    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = hub, False, True
    huggingface_hub.close_session()  # the client of an offline process refuses every call
    push(plan_push(out, name))


def _jump(source: random.Random) -> None:
    """A time of day that anyone may set while we run: each reading is up to a year off, in both directions."""
    year, now, now_ns = 365 * 86400, time.time, time.time_ns
    time.time = lambda: now() + source.uniform(-year, year)  # type: ignore[method-assign]
    time.time_ns = lambda: now_ns() + source.randint(-year, year) * 10**9  # type: ignore[method-assign]


def nothing() -> None:
    """The first child pays for the forkserver's imports."""


def write_for_ever(first: Path, second: Path, target: Path) -> None:
    """Save one artefact after the other under the same name until killed."""
    for masks in cycle([load(first), load(second)]):
        save(target, masks)


def _leave(code: int, message: str) -> None:
    with contextlib.suppress(OSError):  # the log, too, may have met the limit
        sys.stderr.write(message + "\n")
    os._exit(code)
