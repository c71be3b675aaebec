"""Measure time and memory of this process, and record the environment that they depend on."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Memory:
    """Peak resident memory of a process, sampled every 10 ms: anonymous, and with pages of mapped files.

    Args:
        process: its number; None: this process.
    """

    def __init__(self, process: int | None = None) -> None:
        self.process = process
        self.anonymous = self.total = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            now = resident_bytes(self.process)
            self.anonymous = max(self.anonymous, now["RssAnon"])
            self.total = max(self.total, now["VmRSS"])

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def resident_bytes(process: int | None = None) -> dict[str, int]:
    """Read resident memory of a process by kind from /proc; zeros on systems without it, and once it has ended."""
    try:
        lines = Path("/proc", str(process or "self"), "status").read_text().splitlines()
    except OSError:
        lines = []
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return {key: sizes.get(key, 0) for key in ("RssAnon", "RssFile", "VmRSS")}


class Clock:
    """Timer of code blocks: wall seconds, and processor seconds, which other jobs on the machine do not lengthen."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wall: list[float] = []
        self.processor: list[float] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._finish()
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self._finish()
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def seconds(self) -> list[float]:
        """Processor seconds on a CPU with one thread, else wall seconds."""
        return self.processor if self.device.type == "cpu" and torch.get_num_threads() == 1 else self.wall


def environment(device: torch.device) -> dict[str, Any]:
    """Describe device, threads and versions, on which times depend."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
