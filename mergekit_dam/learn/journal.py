"""Where the records of a run go: metrics.jsonl, the progress bar, and trackers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator

from mergekit_dam.engine.progress import bar
from mergekit_dam.engine.snapshots import Snapshots
from mergekit_dam.errors import DamError
from mergekit_dam.merging.mask_keys import BACKDOOR_DETECTION, TASK_SHARED

# records that stand behind the bar, by a short name: it shall fit a line
_SHOWN = {"window": "window", "loss": "loss", f"density/{TASK_SHARED}": "m1", f"density/{BACKDOOR_DETECTION}": "m2"}
PROJECT, FOLDER = "mergekit-dam", "runs"
_CURES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


class Recorder:
    """Where records and progress go.

    Args:
        metrics: the open metrics.jsonl.
        tracker: where else records go.
        quiet: no progress bar.
        snapshots: of the run, which hold how long its earlier parts took.

    Attributes:
        started: when the run was begun, in the first of its parts (ISO 8601).
        seconds: by phase, of those that came to their end, in all parts of the run.
    """

    def __init__(self, metrics: IO[str], tracker: Tracker, *, quiet: bool, snapshots: Snapshots) -> None:
        self._metrics, self._tracker, self._quiet = metrics, tracker, quiet
        self._last: dict[str, Any] = {}
        self._running: tuple[str, float] | None = None
        earlier = snapshots.facts or {}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.started = str(earlier.get("started", now))
        self.seconds: dict[str, float] = {str(k): float(v) for k, v in dict(earlier.get("seconds", {})).items()}
        snapshots.follow(seconds=self.so_far, started=lambda: self.started)

    def so_far(self) -> dict[str, float]:
        """Seconds by phase, those of the running one included."""
        if self._running is None:
            return dict(self.seconds)
        title, begun = self._running
        spent = self.seconds.get(title, 0.0) + time.perf_counter() - begun
        return self.seconds | {title: round(spent, 3)}

    def track(self, record: dict[str, Any]) -> None:
        """One flat record."""
        self._last.update(record)
        self._metrics.write(json.dumps(record) + "\n")
        self._tracker.log(record)

    def progress(self, steps: Iterable[int], title: str) -> Iterable[int]:
        """The steps, with a bar that shows the loss and the densities."""
        self._running = title, time.perf_counter()
        try:
            yield from bar(steps, title, quiet=self._quiet, shown=self._shown)
        finally:  # also where the loop is left early
            self.seconds.update(self.so_far())
            self._running = None

    def _shown(self) -> dict[str, str]:
        return {
            _SHOWN[key]: f"{value:.2f}" if isinstance(value, float) else str(value)
            for key, value in self._last.items()
            if key in _SHOWN
        }


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

    snapshots.follow(journal=length)
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
        f"tracker {name}",
        expected=f"the package {_CURES[name]}",
        got=got,
        cure=f"pip install 'mergekit-dam[{name}]', or leave `tracker` out: metrics.jsonl is always written.",
    )
