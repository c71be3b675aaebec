"""The device that settings name, found from several threads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from mergekit_dam.engine.device import device_of


@pytest.fixture
def unread_state() -> Iterator[None]:
    """Accelerate's state as in a new process, before and after the test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("unread_state")
def test_the_first_device_of_a_process_is_the_same_in_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = PartialState._prepare_backend

    def slowly(*args: Any, **given: Any) -> Any:  # a thread may be interrupted here, where the device is None
        time.sleep(0.05)
        return chosen(*args, **given)

    monkeypatch.setattr(PartialState, "_prepare_backend", slowly)
    start = Barrier(8)

    def found(_: int) -> torch.device:
        start.wait()
        return device_of("auto")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(found, range(8)))) == 1
