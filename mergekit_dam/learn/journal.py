"""Write the records of a run to metrics.jsonl, show progress, and time the phases."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from mergekit_dam.engine.progress import progress_bar
from mergekit_dam.engine.snapshots import Snapshots
from mergekit_dam.merging.mask_keys import BACKDOOR_DETECTION, TASK_SHARED

# records to show after the bar, with short names, so that the bar fits a line
_SHOWN = {"window": "window", "loss": "loss", f"density/{TASK_SHARED}": "m1", f"density/{BACKDOOR_DETECTION}": "m2"}


class Recorder:
    """Writer of a run's records, and its timer.

    Args:
        metrics: the open metrics.jsonl.
        quiet: no progress bar.
        snapshots: snapshots of the run; they hold the times of its earlier, interrupted parts.

    Attributes:
        started: start of the first part of the run (ISO 8601).
        seconds: seconds by finished phase, over all parts of the run.
    """

    def __init__(self, metrics: IO[str], *, quiet: bool, snapshots: Snapshots) -> None:
        self._metrics, self._quiet = metrics, quiet
        self._last: dict[str, Any] = {}
        self._running: tuple[str, float] | None = None
        earlier = snapshots.facts or {}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.started = str(earlier.get("started", now))
        self.seconds: dict[str, float] = {str(k): float(v) for k, v in dict(earlier.get("seconds", {})).items()}
        snapshots.add_facts(seconds=self.seconds_so_far, started=lambda: self.started)

    def seconds_so_far(self) -> dict[str, float]:
        """Return seconds by phase, those of the running phase included."""
        if self._running is None:
            return dict(self.seconds)
        title, begun = self._running
        spent = self.seconds.get(title, 0.0) + time.perf_counter() - begun
        return self.seconds | {title: round(spent, 3)}

    def track(self, record: dict[str, Any]) -> None:
        """Write one flat record."""
        self._last.update(record)
        self._metrics.write(json.dumps(record) + "\n")

    def progress(self, steps: Iterable[int], title: str) -> Iterable[int]:
        """Yield the steps with a progress bar that shows loss and densities, and time them as phase `title`."""
        self._running = title, time.perf_counter()
        try:
            yield from progress_bar(steps, title, quiet=self._quiet, shown=self._shown)
        finally:  # also if the loop ends early
            self.seconds.update(self.seconds_so_far())
            self._running = None

    def _shown(self) -> dict[str, str]:
        return {
            _SHOWN[key]: f"{value:.2f}" if isinstance(value, float) else str(value)
            for key, value in self._last.items()
            if key in _SHOWN
        }


def open_journal(path: Path, snapshots: Snapshots) -> IO[str]:
    """Open metrics.jsonl, cut to its length at the snapshot from which the run resumes, or emptied."""
    facts = snapshots.facts
    file = path.open("a", encoding="utf-8")
    if path.is_file():
        file.truncate(min(path.stat().st_size, facts["journal"]) if facts is not None else 0)

    def length() -> int:
        file.flush()
        if path.is_file():
            os.fsync(file.fileno())
        return file.tell()

    snapshots.add_facts(journal=length)
    return file
