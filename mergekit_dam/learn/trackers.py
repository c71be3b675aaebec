"""The records of `metrics.jsonl` in an experiment tracker, too (setting `tracker`), through accelerate.

TensorBoard's files go to `runs/` in the working directory, as is its own custom; wandb and trackio read their own
environment variables and logins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from mergekit_dam.errors import DamError

PROJECT, FOLDER = "mergekit-dam", "runs"
_CURES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


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
