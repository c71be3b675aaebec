"""Small models, what a merge of them must give, and the question whether a directory holds such a merge."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_dam.artifact.masks_file import MASKS_FILE, load
from mergekit_dam.errors import DamError
from tests.faults.child import Job, merge, nothing
from tests.helpers.constants import constants_file
from tests.helpers.tiny_models import WORDS, make_model

STEPS = 12
_CONSTANTS: dict[str, Any] = {"refresh_steps": 2, "snapshot_every": 0.0}
Content = dict[str, str]  # file below the output -> SHA-256


@dataclass(frozen=True)
class Outcome:
    """How a child ended: exit code (negative: the signal), seconds it ran, what it wrote to its log."""

    code: int | None
    seconds: float
    log: str


class World:
    """A base, two fine-tunes and calibration texts below `root`, and the reference results by seed.

    Args:
        root: an empty folder.
        seed: of the random moments, sizes and bits.
        steps: of learning.
        rows: that will be run, so that work of several may be done at once.
    """

    def __init__(self, root: Path, *, seed: int = 0, steps: int = STEPS, rows: Collection[str] = ()) -> None:
        self.root, self.steps = root, steps
        self.random = random.Random(seed)
        self.base = make_model("BertModel", root / "base")
        self.models = [
            make_model("BertForSequenceClassification", root / name, seed=i + 1, body=self.base)
            for i, name in enumerate("ab")
        ]
        words = random.Random(0)
        self.texts = root / "texts.txt"
        self.texts.write_text("\n".join(" ".join(words.choices(WORDS, k=6)) for _ in range(24)))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.faults.child"])
        warm = self.context.Process(target=nothing)
        warm.start()
        warm.join()
        self._references: dict[tuple[int, int], Content] = {}
        self._numbers = 0
        self.seconds: dict[int, float] = {}  # that a whole run takes, by processes
        self.merged = root / "merged"  # once there is a reference
        self.rows = rows
        self.verdicts: dict[str, tuple[int, int]] = {}  # of tests that ran already: cases that passed, and failed

    def place(self) -> Path:
        """A path of its own for a trial."""
        self._numbers += 1
        return self.root / f"run{self._numbers}"

    def job(
        self, *, seed: int = 0, processes: int = 1, cache: Path | None = None, place: Path | None = None, **more: Any
    ) -> Job:
        """A merge into a directory of its own, with shards, so that writing takes several files; it can always resume.

        Args:
            processes: that learn together.
            cache: of learned masks; None: a new one.
            place: folder for all that the merge writes; None: a new one.
            more: other entries of the `Job`.
        """
        place = place or self.place()
        settings = {
            "calibration": str(self.texts),
            "steps": self.steps,
            "batch_size": 4,
            "num_samples": 16,
            "max_length": 12,
            "scan_steps": 4,
            "refresh_every": 4,
            "seed": seed,
            "num_processes": processes,
            "constants": self.constants(),
        }
        recipe = {
            "merge_method": "dam",
            "base_model": str(self.base),
            "dtype": "float32",
            "parameters": settings,
            "models": [{"model": str(model)} for model in self.models],
        }
        job = Job(recipe, place / "out", cache or place / "cache", place / "log", options={"out_shard_size": 8000})
        return replace(job, **more)

    def constants(self, **more: Any) -> str:
        """A file of the constants of every merge, and others."""
        return constants_file(**{**_CONSTANTS, **more})

    def start(self, job: Job) -> Any:
        """The child, running."""
        process = self.context.Process(target=merge, args=(job,))
        process.start()
        return process

    def run(self, job: Job, *, kill_after: float | None = None) -> Outcome:
        """A merge in a child of its own, ended by SIGKILL after so many seconds if it is not over by then."""
        began = time.monotonic()
        process = self.start(job)
        process.join(kill_after if kill_after is not None else 300)
        process.kill()
        process.join()
        log = job.log.read_text("utf-8", errors="replace") if job.log.is_file() else ""
        return Outcome(process.exitcode, time.monotonic() - began, log)

    def call(self, function: Callable[..., None], *arguments: Any, kill_after: float | None = None) -> Outcome:
        """Any function in a child of its own, likewise."""
        began = time.monotonic()
        process = self.context.Process(target=function, args=arguments)
        process.start()
        process.join(kill_after if kill_after is not None else 300)
        process.kill()
        process.join()
        return Outcome(process.exitcode, time.monotonic() - began, "")

    def reference(self, seed: int = 0, processes: int = 1) -> Content:
        """What an undisturbed merge gives."""
        key = seed, processes
        if key not in self._references:
            job = self.job(seed=seed, processes=processes)
            outcome = self.run(job)
            assert outcome.code == 0, outcome.log
            self._references[key] = content(job.out)
            self.seconds[processes] = outcome.seconds
            if key == (0, 1):
                again = self.run(job)  # masks from the cache: the time of the merge alone
                assert again.code == 0 and content(job.out) == self._references[key], again.log
                self.merge_seconds = again.seconds
                shutil.copytree(job.out, self.merged)
            shutil.rmtree(job.out.parent)
        return self._references[key]

    def learned(self, seed: int = 0) -> Path:
        """A cache that holds the masks already."""
        cache = self.root / f"cache-{seed}"
        if not cache.is_dir():
            job = self.job(seed=seed, cache=cache)
            outcome = self.run(job)
            assert outcome.code == 0, outcome.log
            shutil.rmtree(job.out.parent)
        return cache


def content(out: Path) -> Content:
    """Digests of weights, index, config, masks and heads; logs and cards may differ."""
    names = ("*.safetensors", "*.json", "dam/*.safetensors", "dam/heads/*")
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for name in names
        for file in sorted(out.glob(name))
    }


def finished(out: Path) -> bool:
    """Whether a directory looks like a model: it has a config.json."""
    return (out / "config.json").is_file()


def sound_masks(*places: Path) -> bool:
    """Whether every artefact below `places` that has its final name can be loaded."""
    try:
        for place in places:
            for file in place.rglob(MASKS_FILE):
                load(file)
    except DamError:
        return False
    return True
