"""What one hostile input may cost: time of the processor, and memory at its peak."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS, MEGABYTES = 5.0, 256.0
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def bounded(*, seconds: float = SECONDS, megabytes: float = MEGABYTES) -> Iterator[None]:
    """Fail if the block takes more time of this process, or at any moment more memory than there was before it.

    The kernel's mark of the peak is set back first; where that cannot be done, only the time counts.
    """
    measured = _reset_peak()
    before, began = _megabytes("VmRSS") if measured else 0.0, time.process_time()
    yield
    spent = time.process_time() - began
    assert spent <= seconds, f"{spent:.1f} s"
    if measured:
        grown = _megabytes("VmHWM") - before
        assert grown <= megabytes, f"{grown:.0f} MB"


def _reset_peak() -> bool:
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _megabytes(entry: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{entry}:"))
    return float(line.split()[1]) / 1024
