"""Tensors on their way from host memory to an accelerator, while it computes.

Copies are begun ahead, on a stream of their own, by a thread that first brings what is not pinned (maps of files) into
pinned memory. What arrived stays until the block after next is announced, since a backward pass asks for a tensor
twice. So the device holds the frozen tensors of two blocks at most.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

_Arrival = tuple[Tensor, torch.cuda.Event]


class Transfers:
    """Copies to one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transfers")
        self._now: dict[int, Future[_Arrival]] = {}  # of the block that was announced last, by address in the host
        self._before: dict[int, Future[_Arrival]] = {}

    def begin(self, tensors: Iterable[Tensor]) -> None:
        """Announce the tensors of the next block; those of the block before the one at hand are let go of."""
        held = self._before | self._now
        wanted = {tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}
        ahead = {
            at: held[at] if at in held else self._thread.submit(self._copied, tensor) for at, tensor in wanted.items()
        }
        self._before, self._now = self._now, ahead

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, for work on the current stream; one that was not announced is copied now."""
        coming = self._now.get(tensor.data_ptr()) or self._before.get(tensor.data_ptr())
        if coming is None or not tensor.numel():
            return tensor.to(self._device, non_blocking=tensor.is_pinned())
        copy, arrived = coming.result()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(arrived)
        copy.record_stream(current)  # its memory is not given to others before what runs there is done
        return copy

    def _copied(self, tensor: Tensor) -> _Arrival:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
            copy = pinned.to(self._device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
            return copy, arrived
