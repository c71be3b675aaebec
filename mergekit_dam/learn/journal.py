"""Where the records of a run go: metrics.jsonl, the progress bar, and trackers."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator
from accelerate.utils import tqdm

from mergekit_dam.engine.snapshots import Snapshots
from mergekit_dam.errors import DamError

PROJECT, FOLDER = "mergekit-dam", "runs"
_CURES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


class Recorder:
    """Where records and progress go.

    Args:
        metrics: the open metrics.jsonl.
        tracker: where else records go.
        quiet: no progress bar.

    Attributes:
        seconds: by phase, of those that came to their end.
    """

    def __init__(self, metrics: IO[str], tracker: Tracker, *, quiet: bool) -> None:
        self._metrics, self._tracker, self._quiet = metrics, tracker, quiet
        self._last: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}

    def track(self, record: dict[str, Any]) -> None:
        """One flat record."""
        self._last.update(record)
        self._metrics.write(json.dumps(record) + "\n")
        self._tracker.log(record)

    def progress(self, steps: Iterable[int], title: str) -> Iterable[int]:
        """The steps, with a bar that shows the loss and the densities."""
        done = {"initial": steps.start, "total": steps.stop} if isinstance(steps, range) and steps.step == 1 else {}
        bar = tqdm(steps, desc=f"dam: {title}", disable=self._quiet or None, file=sys.stderr, **done)
        begun = time.perf_counter()
        for step in bar:
            yield step
            shown = {k: f"{v:.3f}" for k, v in self._last.items() if k == "loss" or k.startswith("density/")}
            bar.set_postfix(shown, refresh=False)
        self.seconds[title] = round(time.perf_counter() - begun, 3)


def open_journal(path: Path, snapshots: Snapshots) -> IO[str]:
    """metrics.jsonl as it was at the snapshot that the run goes on from, or empty."""
    facts = snapshots.facts
    file = path.open("a", encoding="utf-8")
    if path.is_file():
        file.truncate(min(path.stat().st_size, facts["journal"]) if facts is not None else 0)

    def length() -> int:
        file.flush()
        if path.is_file():
            os.fsync(file.fileno())
        return file.tell()

    snapshots.follow(length)
    return file


class Tracker:
    """An open run of a tracker.

    Args:
        name: `tensorboard`, `wandb` or `trackio`; None: records are dropped.
        settings: of the merge, for the tracker's table of runs.

    Raises:
        DamError: the tracker's package is not installed.
    """

    def __init__(self, name: str | None, settings: Mapping[str, Any]) -> None:
        self._accelerator: Accelerator | None = None
        if name is None:
            return
        try:
            self._accelerator = Accelerator(log_with=name, project_dir=FOLDER)
            self._accelerator.init_trackers(PROJECT, config={k: _plain(v) for k, v in settings.items()})
            started = bool(self._accelerator.trackers)
        except (ImportError, ValueError) as error:
            raise _missing(name, str(error)) from error
        if not started:
            raise _missing(name, "none")

    def log(self, record: Mapping[str, Any]) -> None:
        """The numbers of a record, at its step."""
        if self._accelerator is not None and "step" in record:
            phase = record.get("phase", "")
            numbers = {f"{phase}/{k}": v for k, v in record.items() if isinstance(v, float)}
            self._accelerator.log(numbers, step=int(record["step"]))

    def close(self) -> None:
        """Write what is left and end the run."""
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:  # its end_training would also end the group of processes
                tracker.finish()


def _plain(value: Any) -> Any:
    """What every tracker takes as a setting of a run."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _missing(name: str, got: str) -> DamError:
    return DamError(
        f"tracker {name}", expected=f"the package {_CURES[name]}", got=got,
        cure=f"pip install 'mergekit-dam[{name}]', or leave `tracker` out: metrics.jsonl is always written.",
    )  # fmt: skip
